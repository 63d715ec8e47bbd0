"""Problems without networks, searched by the two-phase method; each runs by itself, see docs/problems.md."""
