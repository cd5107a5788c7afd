"""A small diffusion model of drawings, its LoRAs, and a measurement of their fusions."""
