"""Which channels go together, a client's part of the model, and the smaller module."""
