"""The core: hook specs, width groups, plans, the round. Plugins import from its modules; nothing here names a strategy."""
