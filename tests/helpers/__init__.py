"""What several tests share: import as `helpers.NAME` (pytest's `pythonpath`)."""
