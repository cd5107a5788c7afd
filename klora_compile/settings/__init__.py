"""What a user sets: a rule's numbers, what all rules share, how LoRA files are read."""
