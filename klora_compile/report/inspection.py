"""The object that ``klora inspect --json`` prints; other programs rely on its fields."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from klora_compile.report.compression import compression_of, stored_json
from klora_compile.report.scores import number_of
from klora_compile.report.summary import summarise
from klora_runtime.artifact.checks import FORMAT_VERSION
from klora_runtime.artifact.document import Document
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.artifact.schedule import Schedule, ScheduledEntry, Slot

#: Fields of the summary that are here too.
_SUMMARISED = (
    *("rule", "gamma", "derived", "family", "families"),
    *("clock", "shifts", "few_steps", "truncations", "near_ties"),
)

#: Printed name of each number of a slot, and its key in the scores.
_NUMBERS = (("topk", "top_k"), ("l1", "l1"), ("frobenius", "frobenius"), ("rank", "rank"))


def inspection(fusion: Fusion | Document, shift: float | None = None) -> dict[str, Any]:
    """Return a fusion as JSON values, with numbers in full precision.

    Args:
        fusion: the fusion, or its document; then what needs its numbers is null.
        shift: see :func:`~klora_compile.runs.runs_of`.

    In each layer, ``content_*`` and ``style_*`` (for more LoRAs ``content.1_*``, …) are null if
    that LoRA does not adapt the layer or the rule did not measure it. ``k`` and the Top-K sums are
    also null if only one LoRA adapts the layer; ``ratio`` is null if nothing was compared.
    """
    summary = summarise(fusion, shift).json()
    compression, stored = compression_of(fusion), stored_json(fusion)
    return {
        "format_version": FORMAT_VERSION,
        "tool": fusion.tool,
        **{name: summary[name] for name in _SUMMARISED},
        "fingerprint": fusion.fingerprint,
        "factor_bytes": fusion.nbytes,
        "thin": fusion.is_thin,
        "compression": None if compression is None else compression.json(),
        "sources": {name: asdict(source) for name, source in fusion.sources.items()},
        "slots": {name: _slot(slot) for name, slot in fusion.slots.items()},
        "layers": [_layer(fusion, entry, stored[entry.path]) for entry in fusion.entries],
    }


def _slot(slot: Slot) -> dict[str, Any]:
    return {"role": slot.role, "sources": list(slot.sources), "derived": slot.derived}


def _layer(fusion: Schedule, entry: ScheduledEntry, stored: dict[str, Any]) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for slot in fusion.slots:
        for json_name, key in _NUMBERS:
            numbers[f"{slot}_{json_name}"] = number_of(fusion, entry, slot, key)
    return {
        "name": entry.layer,
        "parameter": entry.parameter,
        "shape": list(entry.shape),
        "fate": entry.fate,
        "k": number_of(fusion, entry, "k"),
        **numbers,
        "ratio": number_of(fusion, entry, "ratio"),
        "timeline": [{"from": start, **row} for start, row in entry.timeline.rows()],
        "stored": stored,
    }
