"""The map of a schedule on the page: layers over progress, with the numbers of each layer."""

from __future__ import annotations

from collections.abc import Mapping

from klora_compile.report.scores import number_of
from klora_compile.report.summary import gamma_of, rule_of
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.artifact.schedule import ScheduledEntry
from klora_runtime.artifact.schedule_html import schedule_html
from klora_runtime.errors import shown


def map_html(fusion: Fusion) -> str:
    """Return the map as HTML; the tooltip of each layer has its ratio, scores and turns."""
    return schedule_html(fusion, _heading(fusion), about=lambda entry: layer_text(fusion, entry))


def layer_text(fusion: Fusion, entry: ScheduledEntry) -> str:
    """Return lines about a layer: its name, ratio, scores by LoRA, and which LoRA acts when."""
    lines = [shown(entry.layer)]
    ratio = number_of(fusion, entry, "ratio")
    if ratio is not None:
        lines.append(f"ratio {ratio:.4g}")
    stated = entry.scores.get(fusion.rule.name) or {}
    for slot in fusion.slots:
        numbers = stated.get(slot)
        if isinstance(numbers, Mapping):
            words = [f"{n} {v:.4g}" for n, v in numbers.items() if isinstance(v, int | float)]
            lines.append(f"{shown(slot)}: {', '.join(words)}")
    return "\n".join([*lines, _turns(entry)])


def _turns(entry: ScheduledEntry) -> str:
    """Return which slots act from which progress on."""
    turns = []
    for start, row in entry.timeline.rows():
        acting = [f"{shown(slot)} x {value:.3g}" for slot, value in row.items() if value]
        turns.append(f"from {start:.3f} {' + '.join(acting) or 'nothing'}")
    return "; ".join(turns)


def _heading(fusion: Fusion) -> str:
    rule = rule_of(fusion)
    layers = [entry for entry in fusion.entries if entry.acts]
    switching = sum(entry.timeline.switches for entry in layers)
    gamma = gamma_of(fusion)
    words = [fusion.rule.name, *([] if rule is None else [rule.text()])]
    if isinstance(gamma, float):
        words.append(f"gamma {gamma:.4g}")
    return f"{', '.join(filter(None, words))}: {switching} of {len(layers)} layers switch"
