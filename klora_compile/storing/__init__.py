"""Storage of factors in an artifact: compressed to few bits, or as references to the sources."""
