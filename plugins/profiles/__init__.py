"""What each device affords."""
