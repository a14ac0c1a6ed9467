"""From options to a run folder, once or many times."""
