"""How a fusion acts on live layers; a new mode is a new file that does what `mode` says."""
