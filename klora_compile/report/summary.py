"""The short account of a fusion: layers by fate, near ties, gamma, ranks, bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from klora_compile.report.fates import COMMON, QUIET
from klora_compile.report.scores import number_of
from klora_compile.rules.kit.breakpoints import near_range_end, near_step
from klora_compile.rules.lookup import known_rule
from klora_compile.rules.rule import Rule
from klora_runtime.artifact.schedule import Schedule
from klora_runtime.errors import shown
from klora_runtime.families.catalogue import family_name


@dataclass(frozen=True)
class NearTie:
    """A layer whose choice rounding could turn at some step of some step count."""

    layer: str
    why: str


@dataclass(frozen=True)
class Summary:
    """Numbers about one fusion, derived from it alone."""

    family: str | None
    rule: str
    rule_text: str
    """The rule's own settings in a few words; empty where this klora does not know it."""
    settings: Mapping[str, Any]
    """The rule's parameters."""
    gamma: float | Mapping[str, float | None] | None
    """One number where one component has it, else by component; None for rules without it."""
    derived: Mapping[str, Any]
    """All that the rule computed for the whole model."""
    fates: Mapping[str, int]
    """Fate -> number of layers: first those that the rule gives layers, none left out."""
    near_ties: tuple[NearTie, ...]
    ranks: Mapping[str, tuple[int, ...]]
    """Source -> its distinct ranks."""
    bytes_in: Mapping[str, int]
    """Source -> bytes of its file."""

    def json(self) -> dict[str, Any]:
        """As JSON values."""
        fields = asdict(self)
        names = {"name": "rule", "parameters": "settings", "text": "rule_text"}
        rule = {name: fields.pop(field) for name, field in names.items()}
        return {"rule": rule, **fields}


def summarise(fusion: Schedule) -> Summary:
    """Return the summary of a fusion that was compiled or loaded."""
    counts = Counter(entry.fate for entry in fusion.entries)
    rule = rule_of(fusion)
    common = [fate for fate in COMMON if rule is None or not rule.whole or fate != "one-sided"]
    fates = dict.fromkeys((*(() if rule is None else rule.fates), *common, *sorted(counts)))
    return Summary(
        family=fusion.family,
        rule=fusion.rule.name,
        rule_text="" if rule is None else rule.text(),
        settings=dict(fusion.rule.parameters),
        gamma=gamma_of(fusion),
        derived=dict(fusion.rule.derived),
        fates={fate: counts[fate] for fate in fates},
        near_ties=tuple(near_ties(fusion)),
        ranks={name: source.ranks for name, source in fusion.sources.items()},
        bytes_in={name: source.bytes for name, source in fusion.sources.items()},
    )


def gamma_of(fusion: Schedule) -> float | dict[str, float | None] | None:
    """gamma as one number, by component where there are several, None where it is undefined."""
    derived = fusion.rule.derived.get("gamma")
    if not isinstance(derived, Mapping):
        return None
    if len(derived) > 1:
        return dict(derived)
    return next(iter(derived.values()), None)


def near_ties(fusion: Schedule) -> Iterator[NearTie]:
    """Layers whose decision is near a tie.

    A breakpoint within 1e-6 of the progress of some step of some N up to 100, or a ratio within
    1e-6 of the ends of S's range. Rules that compare nothing have none.
    """
    rule = rule_of(fusion)
    ends = None if rule is None else rule.range()
    if ends is None:
        return
    for entry in fusion.entries:
        for start in entry.timeline.starts[1:]:
            step = near_step(start)
            if step is not None:
                index, steps = step
                yield NearTie(entry.layer, f"switches at {start:.9g}, step {index} of {steps}")
        ratio = number_of(fusion, entry, "ratio")
        end = None if ratio is None else near_range_end(ratio, ends)
        if end is not None:
            yield NearTie(entry.layer, f"its ratio is {end:g}, an end of S's range")


def rule_of(fusion: Schedule) -> Rule | None:
    """The rule that made a fusion, or None where it or its settings are unknown to this klora."""
    return known_rule(fusion.rule.name, fusion.rule.parameters)


def summary_lines(summary: Summary) -> list[tuple[str, str]]:
    """Return the summary as rows of (label, text) for a terminal."""
    words = ", ".join(filter(None, (summary.rule, summary.rule_text)))
    rows = [("base model", family_name(summary.family)), ("rule", shown(words))]
    for name, value in summary.derived.items():
        rows.append((shown(name), gamma_text(summary.gamma if name == "gamma" else value)))
    total = sum(summary.fates.values())
    listed = [(fate, n) for fate, n in summary.fates.items() if n or fate not in QUIET]
    for position, (fate, count) in enumerate(listed):
        rows.append((f"layers ({total})" if position == 0 else "", f"{count:>5} {shown(fate)}"))
    rows.append(("near ties", str(len(summary.near_ties))))
    rows.extend(("", f"{shown(tie.layer)}: {tie.why}") for tie in summary.near_ties[:3])
    if len(summary.near_ties) > 3:
        rows.append(("", "… --json lists all"))
    rows.append(("ranks", _by_slot({s: ranks_text(r) for s, r in summary.ranks.items()})))
    return rows


def bytes_text(count: int) -> str:
    """Return a number of bytes for people, in decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def gamma_text(gamma: Any) -> str:
    """gamma, or another number of the whole model, for people; made safe for a terminal."""
    if isinstance(gamma, Mapping):
        return ", ".join(f"{shown(name)} {gamma_text(value)}" for name, value in gamma.items())
    if gamma is None:
        return "undefined (no layer needs it)"
    return f"{gamma:.6g}" if isinstance(gamma, int | float) else shown(gamma)


def ranks_text(ranks: Sequence[int]) -> str:
    """Distinct ranks for people; the ends alone where they are many."""
    if len(ranks) > 4:
        return f"{ranks[0]}…{ranks[-1]}"
    return "/".join(map(str, ranks))


def _by_slot(texts: Mapping[str, str]) -> str:
    return ", ".join(f"{shown(slot)} {text}" for slot, text in texts.items())
