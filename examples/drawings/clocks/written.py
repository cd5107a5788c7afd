"""The comparison of clocks as text."""

from __future__ import annotations

from drawings.clocks.rows import CLOCKS, PATTERNS, PLACES, name_of
from drawings.table.intervals import difference, interval
from drawings.table.kept import Results
from drawings.table.rows import REFERENCE
from klora_compile.report.table import markdown_table

#: Key in a verdict -> heading.
_MEASURES = {
    "both": "both (harmonic mean)",
    "distance": "ST-LPIPS to the true drawing",
    "many": "ST-LPIPS to its own picture in 50 steps",
}


def markdown(results: Results) -> str:
    """Return two tables: each row at each place, and the clock of noise minus that of steps."""
    rows = [REFERENCE, *(name_of(pattern, clock) for pattern in PATTERNS for clock in CLOCKS)]
    means = [
        [
            row,
            f"{place.shift:g}",
            str(place.steps),
            *(interval(found, key).text(".3f") for key in _MEASURES),
        ]
        for row in rows
        for place in PLACES
        if (found := results.get(place.of(row)))
    ]
    apart = [
        [
            f"K-LoRA {pattern}",
            f"{place.shift:g}",
            str(place.steps),
            *(difference(noise, step, key).text("+.3f") for key in _MEASURES),
        ]
        for pattern in PATTERNS
        for place in PLACES
        if (step := results.get(place.of(name_of(pattern, CLOCKS[0]))))
        and (noise := results.get(place.of(name_of(pattern, CLOCKS[1]))))
    ]
    heads = ["shift", "steps", *_MEASURES.values()]
    first = markdown_table(["row", *heads], means)
    return f"{first}\n\nBy noise, minus by step:\n\n{markdown_table(['pattern', *heads], apart)}\n"
