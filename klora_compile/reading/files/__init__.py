"""Files of LoRAs and base models, opened as key -> tensor."""
