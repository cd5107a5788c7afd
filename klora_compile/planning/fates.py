"""The fates of layers that all rules share; a rule has its own besides."""

from __future__ import annotations

from collections.abc import Mapping

#: The fate of layers whose stored factors never act.
IDLE = "idle"

#: Fate -> one sentence about it. A fate is a few lower-case words for reports; it decides nothing.
FATES: Mapping[str, str] = {
    "one-sided": "only one LoRA changes this layer; it acts at every step",
    "with its weight": "a bias, chosen with the weight beside it",
    "constant": "a layer without steps (before the loop): constant weights",
    "zero": "both deltas are exactly zero; nothing is stored",
    "dropped": "left out by a setting of the compiler; nothing is stored",
    IDLE: "nothing acts; the stored factors are for other schedules",
}
