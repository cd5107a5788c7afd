"""What people pass as a LoRA or a base, opened as key -> tensor."""
