"""Encoding q: factors in few bits (`FORMAT.md`)."""
