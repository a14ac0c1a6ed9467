"""What every result is read beside."""
