"""What matters in a network, and how much to keep where."""
