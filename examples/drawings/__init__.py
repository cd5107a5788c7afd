"""A small diffusion model of drawings, its LoRAs, and what fusing them gives, measured."""
