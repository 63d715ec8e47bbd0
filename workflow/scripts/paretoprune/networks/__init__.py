"""Dense networks: built, read, written and traced."""
