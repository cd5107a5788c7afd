"""What the fates of layers mean, in the words of a report."""

from __future__ import annotations

from collections.abc import Mapping

from klora_compile.planning.plan import IDLE
from klora_runtime.artifact.fusion import FATES

#: Fate -> what happens to the layer, for every rule.
MEANINGS: Mapping[str, str] = {
    **FATES,
    "summed": "all its LoRAs together, at constant weights",
    "scheduled": "its LoRAs by the schedules that were set",
    "in turns": "its LoRAs one at a time, in turns",
    IDLE: "nothing acts; what is stored is for other schedules",
}

#: Fates that every rule may meet, in the order of reports.
COMMON = ("one-sided", "with its weight", "constant", "zero", "dropped")

#: Of these, those that are not worth a line where no layer has them.
QUIET = ("with its weight", "constant", "dropped")
