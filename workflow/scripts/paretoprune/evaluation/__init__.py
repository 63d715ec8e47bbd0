"""From masks to objectives."""
