"""Images and how they are divided."""
