"""The artifact: the format of `FORMAT.md` as code. Nothing here knows a model or a pipeline."""
