"""Training and testing one model."""
