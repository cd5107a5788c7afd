"""The fates of layers that all rules share; a rule has its own besides."""

from __future__ import annotations

from collections.abc import Collection, Mapping

#: The fates of layers where nothing acts: with stored factors, and without.
IDLE, DROPPED = "idle", "dropped"

#: The fate of layers where only LoRAs of role always act.
BESIDE = "always"

#: Fate -> one sentence about it. A fate is a few lower-case words for reports; it decides nothing.
FATES: Mapping[str, str] = {
    "one-sided": "only one LoRA changes this layer; it acts at every step",
    "with its weight": "a bias, chosen with the weight beside it",
    "constant": "a layer without steps (before the loop): constant weights",
    BESIDE: "only a LoRA that always acts changes this layer",
    "zero": "both deltas are exactly zero; nothing is stored",
    DROPPED: "left out by a setting of the compiler; nothing is stored",
    IDLE: "nothing acts; the stored factors are for other schedules",
}


def fate_with(fate: str, stored: Collection[str]) -> str:
    """Return the fate of a layer, which may depend on the slots that are stored for it."""
    if fate in (IDLE, DROPPED):
        return IDLE if stored else DROPPED
    return fate
