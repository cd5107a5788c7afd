"""LoRAs of held-out subjects and styles on the next base, trained in two regimes."""
