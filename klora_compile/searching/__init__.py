"""Searches: settings of a fusion that a judge likes best, beside the plain sum.

from klora_compile.searching import search

own = OwnPictures({"content": "a fox", "style": "a house in ink"})
axes = {"rule": ["direct", "np"], "weight.style": [0.7, 1.4]}
files = "fox.safetensors", "ink.safetensors"
found = search(pipe, *files, axes, prompt="a fox in ink", own=own)
found.sheet().save("best.png")
found.best.settings, found.best.score, found.plain_sum.score
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from klora_runtime.lazy_names import lazy_names

if TYPE_CHECKING:
    from klora_compile.judging.intervals import Interval
    from klora_compile.judging.judge import About
    from klora_compile.searching.from_python import search
    from klora_compile.searching.result import Check, Scored, Search

__all__ = ["About", "Check", "Interval", "Scored", "Search", "search"]

_HOMES = {
    "About": "klora_compile.judging.judge",
    "Check": "klora_compile.searching.result",
    "Interval": "klora_compile.judging.intervals",
    "Scored": "klora_compile.searching.result",
    "Search": "klora_compile.searching.result",
    "search": "klora_compile.searching.from_python",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
