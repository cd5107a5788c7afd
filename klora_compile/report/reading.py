"""The account of reading LoRAs: used and unused keys, forms, and errors of approximations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from klora_compile.reading.adapter import Adapter
from klora_compile.reading.provenance import slot_kinds
from klora_runtime.errors import shown

_LISTED = 3


def reading_json(adapter: Adapter) -> dict[str, Any]:
    """Return one LoRA's account as JSON values."""
    return {
        "keys": adapter.survey.keys,
        "used": adapter.survey.used,
        "unused": [{"key": each.key, "why": each.why} for each in adapter.survey.unused],
        "forms": slot_kinds(adapter),
        "error": largest_error(adapter),
    }


def reading_lines(adapters: Mapping[str, Adapter]) -> Iterator[tuple[str, str]]:
    """Yield rows of (label, text) for a terminal, by slot."""
    for position, (role, adapter) in enumerate(adapters.items()):
        found = adapter.survey
        used = f"{found.used} of {found.keys} keys of {role.upper()} used"
        yield ("read" if position == 0 else "", used)
        for each in found.unused[:_LISTED]:
            yield "", f"  left out: {shown(each.key)}: {each.why}"
        if len(found.unused) > _LISTED:
            yield "", f"  … and {len(found.unused) - _LISTED} more; --json lists all"
        if {layer.form for layer in adapter.layers.values()} != {"lora"}:
            yield "", f"  {forms_text(adapter)}"


def forms_text(adapter: Adapter) -> str:
    """Return forms with their numbers of layers, and the largest error."""
    counts = Counter(layer.form for layer in adapter.layers.values())
    kinds = slot_kinds(adapter)
    parts = []
    for form, count in sorted(counts.items()):
        dense = kinds[form].get("dense", 0)
        parts.append(f"{count} {form}" + (f" ({dense} dense)" if dense else ""))
    error = largest_error(adapter)
    lost = "nothing is lost" if error == 0 else f"at most {error:.1e} of a delta is lost"
    return f"{', '.join(parts)}; {lost}"


def largest_error(adapter: Adapter) -> float:
    """Return the largest relative Frobenius error of a layer's conversion."""
    return max((layer.error for layer in adapter.layers.values()), default=0.0)
