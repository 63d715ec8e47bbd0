"""Training dense networks and pruned ones."""
