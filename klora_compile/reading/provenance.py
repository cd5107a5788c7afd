"""Notes in an artifact on how a LoRA was read."""

from __future__ import annotations

from collections import Counter
from typing import Any

from klora_compile.reading.adapter import Adapter
from klora_compile.reading.layers import Layer
from klora_runtime.artifact.delta import Dense
from klora_runtime.artifact.schedule import Source
from klora_runtime.hub.fetching import origin_of

#: Forms that are kept to the bit and so need no note.
_PLAIN = {"lora": "lowrank"}


def source_stated(adapter: Adapter) -> Source:
    """Return a LoRA as an artifact states it among its sources."""
    found = adapter.survey
    return Source(
        file=found.path.name.replace("\\", "_"),  # a path separator on some systems
        sha256=adapter.sha256,
        bytes=found.nbytes,
        layout=found.layout,
        ranks=adapter.ranks,
        trigger_words=found.origin.trigger_words,
        license=found.origin.license,
        notes=provenance(adapter),
    )


def provenance(adapter: Adapter) -> dict[str, Any]:
    """Return further keys of a source in an artifact, as JSON values; empty for a plain LoRA.

    ``forms`` is form -> {kind of slot: number of layers}, ``error`` the largest relative Frobenius
    error of a converted layer, ``base`` the name of the base model if its weights were needed (with
    its commit if it is from the Hub), ``unused`` the keys that were left out, ``hub`` the
    repository, file and commit of a LoRA that huggingface_hub downloaded. Options that differ from
    the defaults follow.
    """
    notes: dict[str, Any] = adapter.options.notes()
    origin = origin_of(adapter.survey.path)
    if origin is not None:
        notes["hub"] = origin.notes()
    forms = slot_kinds(adapter)
    if forms != {name: {kind: len(adapter.layers)} for name, kind in _PLAIN.items()}:
        notes["forms"] = forms
    error = max((layer.error for layer in adapter.layers.values()), default=0.0)
    if error > 0.0:
        notes["error"] = error
    if adapter.base is not None:
        notes["base"] = adapter.base
    unused = adapter.survey.unused
    if unused:
        notes["unused"] = [{"key": each.key, "why": each.why} for each in unused]
    return notes


def slot_kinds(adapter: Adapter) -> dict[str, dict[str, int]]:
    """Return form -> {``lowrank`` or ``dense``: number of layers}, sorted."""
    counts = Counter((layer.form, kind_of(layer)) for layer in adapter.layers.values())
    forms: dict[str, dict[str, int]] = {}
    for (form, kind), count in sorted(counts.items()):
        forms.setdefault(form, {})[kind] = count
    return forms


def kind_of(layer: Layer) -> str:
    """Return the kind of slot that holds a layer: ``lowrank`` or ``dense``."""
    return "dense" if isinstance(layer.delta, Dense) else "lowrank"
