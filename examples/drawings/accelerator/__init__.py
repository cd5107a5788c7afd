"""A LoRA that draws in four steps without guidance: the base, distilled into itself."""
