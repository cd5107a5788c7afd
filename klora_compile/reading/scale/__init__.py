"""The scale of a file's factors: where alpha comes from."""
