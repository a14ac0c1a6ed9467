"""What `hfl new-plugin` writes: a plugin of each role and an oracle for it, as modules that run here too."""
