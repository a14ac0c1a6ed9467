"""The contract: what a plugin is, what its hooks are given, what they may answer."""
