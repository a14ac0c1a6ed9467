"""Networks and their state."""
