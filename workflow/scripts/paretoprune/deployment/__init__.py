"""Networks where they will run: exported to files, and timed there; nothing here knows pruning."""
