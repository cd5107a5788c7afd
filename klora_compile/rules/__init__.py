"""Fusion rules: pure functions from per-layer numbers to timelines.

A new rule is a file here and a line of the catalogue. Every rule is public, and so is their base
class :class:`Rule`.
"""

from klora_compile.rules.catalogue import *  # noqa: F403
from klora_compile.rules.lookup import RULES as _RULES
from klora_compile.rules.rule import Rule as Rule

__all__ = ["Rule", *(kind.__name__ for kind in _RULES.values())]
