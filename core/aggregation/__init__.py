"""Updates in global coordinates, and their means."""
