"""Sampling: pictures from a fusion and a diffusers folder, for ``klora sample``."""
