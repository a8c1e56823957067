"""Ground that every wing stands on: files that survive, and locks."""
