"""Problems without networks, searched by the two-phase method; see docs/problems.md for how to run them."""
