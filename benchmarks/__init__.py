"""Speed and memory against plain code and peers, side by side in one run: `make bench`."""
