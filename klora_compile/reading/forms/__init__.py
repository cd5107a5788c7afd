"""The forms of LoRA in files, each in a module with its maths."""
