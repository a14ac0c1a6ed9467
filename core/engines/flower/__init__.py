"""A run as an app of a real Flower federation."""
