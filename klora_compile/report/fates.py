"""What the fates of layers mean, and which of them a report lists."""

from __future__ import annotations

from collections.abc import Mapping

from klora_compile.planning.fates import FATES, IDLE
from klora_compile.rules.lookup import RULES

#: Fate -> what happens to the layer, for every rule.
MEANINGS: Mapping[str, str] = {
    **{fate: meaning for rule in RULES.values() for fate, meaning in rule.fates.items()},
    **FATES,
}

#: Fates that every rule may meet, in the order of reports.
COMMON = tuple(fate for fate in FATES if fate != IDLE)

#: Of these, those that are not worth a line where no layer has them.
QUIET = ("with its weight", "constant", "dropped")
