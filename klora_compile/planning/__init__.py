"""From numbers to a plan: which LoRAs may meet, and what happens to every layer, and when."""
