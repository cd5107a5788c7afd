"""The contents of one LoRA file, for people and for programs."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from math import fsum, sqrt
from typing import Any

from klora_compile.reading.adapter import Adapter
from klora_compile.reading.survey import Survey
from klora_compile.report.summary import ranks_text
from klora_runtime.errors import shown
from klora_runtime.families.catalogue import families_name

_LISTED = 5


def lora_json(survey: Survey, adapter: Adapter | None) -> dict[str, Any]:
    """Return the object that ``klora inspect LORA --json`` prints; programs rely on its fields.

    ``rank`` and ``alpha`` are null if the form of a layer has none, ``shape`` if only the base
    model shows it, ``family`` if layers and shapes do not identify exactly one of ``families``,
    and ``norms`` (Frobenius norms of the scaled deltas by block) if they were not computed. Layers
    are those of diffusers' model.
    """
    return {
        "family": survey.family,
        "families": list(survey.families),
        "layout": survey.layout,
        "names": survey.names,
        "trainer": survey.origin.trainer,
        "license": survey.origin.license,
        "keys": survey.keys,
        "used": survey.used,
        "unused": [{"key": each.key, "why": each.why} for each in survey.unused],
        "problems": list(survey.problems),
        "needs_base": survey.needs_base,
        "trigger_words": list(survey.origin.trigger_words),
        "layers": [
            {
                "name": layer.name,
                "form": layer.form,
                "rank": layer.rank,
                "alpha": layer.alpha,
                "alpha_source": layer.alpha_source,
                "shape": None if layer.shape is None else list(layer.shape),
            }
            for layer in survey.layers
        ],
        "norms": None if adapter is None else norms(adapter),
    }


def lora_lines(survey: Survey, adapter: Adapter | None) -> Iterator[tuple[str, str]]:
    """Yield rows of (label, text) for a terminal.

    Args:
        adapter: the adapter, for norms; None if its values were not read.
    """
    origin = survey.origin
    names = "" if survey.names == "diffusers" else f" in the names of {survey.names}"
    yield "base model", families_name(survey.families)
    yield "layout", f"{survey.layout}{names}"
    yield "trainer", shown(origin.trainer) if origin.trainer else "not stated"
    words = ", ".join(map(shown, origin.trigger_words))
    yield "trigger words", words or "none stated"
    yield "licence", shown(origin.license) if origin.license else "not stated"
    yield "keys", f"{survey.used} of {survey.keys} used"
    for each in survey.unused[:_LISTED]:
        yield "", f"  unused: {shown(each.key)}: {each.why}"
    if len(survey.unused) > _LISTED:
        yield "", f"  … and {len(survey.unused) - _LISTED} more; --json lists all"
    for problem in survey.problems[:_LISTED]:
        yield "", f"  wrong: {problem}"
    if survey.needs_base:
        yield "needs", "the base model's weights: --base PATH"
    yield from _by_kind(survey)
    yield from _scales(survey)
    if adapter is not None:
        yield from _norms(adapter)


def _by_kind(survey: Survey) -> Iterator[tuple[str, str]]:
    counts = Counter((v.component, v.form, _kind(v.shape)) for v in survey.layers)
    for position, ((component, form, kind), count) in enumerate(sorted(counts.items())):
        label = f"layers ({len(survey.layers)})" if position == 0 else ""
        yield label, f"{count:>5} {shown(component)}, {form}, {kind}"


def _kind(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "shape as in the base model"
    if len(shape) == 1:
        return "vector"
    if len(shape) == 2:
        return "linear"
    return f"convolution {'x'.join(map(str, shape[2:]))}"


def _scales(survey: Survey) -> Iterator[tuple[str, str]]:
    """Yield the ranks, and the alphas with their sources."""
    ranks = sorted({layer.rank for layer in survey.layers if layer.rank is not None})
    yield "ranks", ranks_text(ranks) if ranks else "none declared"
    alphas: dict[str, set[float]] = defaultdict(set)
    for layer in survey.layers:
        if layer.alpha is not None:
            alphas[layer.alpha_source].add(layer.alpha)
    for position, (source, values) in enumerate(sorted(alphas.items())):
        low, high = min(values), max(values)
        span = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        yield ("alpha" if position == 0 else ""), f"{span}, from {shown(source)}"


def norms(adapter: Adapter) -> dict[str, float]:
    """Return block -> Frobenius norm of all its scaled deltas."""
    squares: dict[str, list[float]] = defaultdict(list)
    for layer in adapter.layers.values():
        squares[block_of(layer.name)].append((layer.scaling * layer.delta.norm()) ** 2)
    return {block: sqrt(fsum(squares[block])) for block in sorted(squares, key=_natural)}


def _norms(adapter: Adapter) -> Iterator[tuple[str, str]]:
    found = norms(adapter)
    largest = max(found.values(), default=0.0)
    for position, (block, norm) in enumerate(found.items()):
        bar = "#" * round(20 * norm / largest) if largest else ""
        yield ("norms" if position == 0 else ""), f"{norm:>10.4g}  {shown(block)}  {bar}".rstrip()


def block_of(name: str) -> str:
    """Return the block of a layer: its component and the first numbered part of its path.

    ``unet.down_blocks.1.attentions.0…`` gives ``unet.down_blocks.1``; a layer outside all blocks
    gives its component.
    """
    found = re.match(r"[^.]+(?:\.[^.]+)*?\.\d+(?=\.)", name)
    return found[0] if found else name.partition(".")[0]


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts ``x.2`` before ``x.10``."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]
