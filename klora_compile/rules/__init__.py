"""Fusion rules: pure maths from per-layer numbers to timelines. A new rule is a new file here."""
