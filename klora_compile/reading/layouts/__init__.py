"""How trainers name the tensors of a LoRA file: one table per family of base models."""
