"""Data sets, and who holds them."""
