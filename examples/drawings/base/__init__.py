"""The base model of drawings: its parts, its drawings and its training."""
