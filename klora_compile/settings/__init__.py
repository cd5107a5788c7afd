"""What a user sets: the rule with its numbers, what all rules share, and how LoRA files are read."""
