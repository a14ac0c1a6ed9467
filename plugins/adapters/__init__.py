"""Strategies for low-rank adapters (docs/ranks.md)."""
