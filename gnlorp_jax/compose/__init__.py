"""From settings to the parts of a run, the same for everything that trains."""
