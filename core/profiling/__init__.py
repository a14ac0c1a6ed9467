"""What a submodel costs, and what a device affords."""
