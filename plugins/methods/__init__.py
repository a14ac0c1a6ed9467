"""Extractions: one file a paper."""
