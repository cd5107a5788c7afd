"""Evaluation of rules on the LoRAs of drawings, against the true drawings."""
