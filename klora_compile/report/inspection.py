"""The object that ``klora inspect --json`` prints. Other programs rely on its fields."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from klora_compile.report.compression import compression_of, stored_json
from klora_compile.report.summary import gamma_of, near_ties
from klora_runtime.fusion import Entry, Fusion
from klora_runtime.schema import FORMAT_VERSION


def inspection(fusion: Fusion) -> dict[str, Any]:
    """A fusion as JSON values, numbers in full precision.

    Per layer, ``content_*`` and ``style_*`` are null where that LoRA does not adapt the layer,
    ``k`` and the Top-K sums where only one does, ``ratio`` where either delta is zero or missing.
    """
    compression = compression_of(fusion)
    return {
        "kind": "fusion",
        "format_version": FORMAT_VERSION,
        "tool": fusion.tool,
        "rule": {"name": fusion.rule.name, "parameters": dict(fusion.rule.parameters)},
        "gamma": gamma_of(fusion),
        "family": fusion.family,
        "fingerprint": fusion.fingerprint,
        "factor_bytes": fusion.nbytes,
        "thin": fusion.is_thin,
        "compression": None if compression is None else compression.json(),
        "sources": {name: asdict(source) for name, source in fusion.sources.items()},
        "near_ties": [{"layer": tie.layer, "why": tie.why} for tie in near_ties(fusion)],
        "layers": [_layer(fusion, entry) for entry in fusion.entries],
    }


def _layer(fusion: Fusion, entry: Entry) -> dict[str, Any]:
    scores = entry.scores.get(fusion.rule.name, {})
    numbers: dict[str, Any] = {}
    for slot in fusion.slots:
        side = scores.get(slot) or {}
        for json_name, key in (("topk", "top_k"), ("l1", "l1"), ("rank", "rank")):
            numbers[f"{slot}_{json_name}"] = side.get(key)
    return {
        "name": entry.layer,
        "parameter": entry.parameter,
        "shape": list(entry.shape),
        "fate": entry.fate,
        "k": scores.get("k"),
        **numbers,
        "ratio": scores.get("ratio"),
        "timeline": [{"from": start, **row} for start, row in entry.timeline.rows()],
        "stored": stored_json(entry),
    }
