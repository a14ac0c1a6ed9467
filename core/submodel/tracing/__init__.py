"""Finds the width groups of a module by running it once."""
