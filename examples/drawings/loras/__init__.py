"""LoRAs of held-out subjects and styles on the base, trained in two regimes."""
