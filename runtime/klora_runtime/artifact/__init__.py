"""The artifact: one file, its specification `FORMAT.md` as code. Knows no model and no pipeline."""
