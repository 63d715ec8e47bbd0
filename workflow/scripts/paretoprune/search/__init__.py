"""The searches; nothing here knows networks."""
