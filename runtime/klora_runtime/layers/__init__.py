"""Live weights: find them, choose a mode, write or branch, give back. Knows no scheduler."""
