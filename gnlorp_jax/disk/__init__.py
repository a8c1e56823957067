"""Ground that every wing stands on: files that survive, locks, extras."""
