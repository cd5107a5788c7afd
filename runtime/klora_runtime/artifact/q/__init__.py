"""Encoding q of `FORMAT.md`: factors in few bits."""
