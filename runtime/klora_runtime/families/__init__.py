"""Base models: one file per model, and the detection of a file's model."""
