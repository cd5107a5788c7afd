"""Base models: one file for each, and what tells one from another."""
