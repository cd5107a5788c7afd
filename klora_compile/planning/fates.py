"""What may become of a layer under every rule; a rule has further fates of its own."""

from __future__ import annotations

from collections.abc import Mapping

#: A fate of layers with something stored that never acts.
IDLE = "idle"

#: Fate -> one sentence on it. A fate decides nothing: it is a few lower-case words for reports.
FATES: Mapping[str, str] = {
    "one-sided": "only one LoRA changes this layer; it acts at every step",
    "with its weight": "a bias, chosen with the weight beside it",
    "constant": "a layer without steps (before the loop): constant weights",
    "zero": "both deltas are exactly zero; nothing is stored",
    "dropped": "left out by a setting of the compiler; nothing is stored",
    IDLE: "nothing acts; what is stored is for other schedules",
}
