"""Catalogues: many LoRAs in one file, and a fusion for any pair of them."""
