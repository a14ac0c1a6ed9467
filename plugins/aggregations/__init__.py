"""What becomes of the updates."""
