"""How well rules fuse the LoRAs of drawings: judged against the true drawing, which exists."""
