"""Fusion rules: pure maths from per-layer numbers to timelines.

A new rule is a file here and a line of the catalogue.
"""
