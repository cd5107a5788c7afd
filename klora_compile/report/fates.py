"""The meanings of layers' fates, and the fates that a report lists."""

from __future__ import annotations

from collections.abc import Mapping

from klora_compile.planning.fates import BESIDE, DROPPED, FATES, IDLE
from klora_compile.rules.lookup import RULES

#: Fate -> its meaning, for all rules.
MEANINGS: Mapping[str, str] = {
    **{fate: meaning for rule in RULES.values() for fate, meaning in rule.fates.items()},
    **FATES,
}

#: Fates that all rules share, in the order of reports.
COMMON = tuple(fate for fate in FATES if fate != IDLE)

#: Common fates that a report omits if no layer has them.
QUIET = ("with its weight", "constant", BESIDE, DROPPED)
