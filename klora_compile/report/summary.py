"""The short account of a fusion: layers by fate, near ties, gamma, ranks, bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from klora_compile.config import Config
from klora_compile.plan import klora_rule
from klora_compile.rules.klora import Klora, near_range_end, near_step
from klora_runtime.errors import ConfigError, shown
from klora_runtime.families import family_name
from klora_runtime.fusion import FATES, Entry, Fusion


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
    settings: Mapping[str, Any]
    """The rule's parameters."""
    gamma: float | Mapping[str, float | None] | None
    """One number where one component has it, else by component."""
    fates: Mapping[str, int]
    """Fate -> number of layers, in the order of :data:`FATES`, none left out."""
    near_ties: tuple[NearTie, ...]
    ranks: Mapping[str, tuple[int, ...]]
    """Slot -> the distinct ranks of its source."""
    bytes_in: Mapping[str, int]
    """Slot -> bytes of its source file."""

    def json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def summarise(fusion: Fusion) -> Summary:
    """The summary of a fusion that was compiled or loaded."""
    counts = Counter(entry.fate for entry in fusion.entries)
    return Summary(
        family=fusion.family,
        rule=fusion.rule.name,
        settings=dict(fusion.rule.parameters),
        gamma=gamma_of(fusion),
        fates={fate: counts[fate] for fate in (*FATES, *sorted(set(counts) - set(FATES)))},
        near_ties=tuple(near_ties(fusion)),
        ranks={name: source.ranks for name, source in fusion.sources.items()},
        bytes_in={name: source.bytes for name, source in fusion.sources.items()},
    )


def gamma_of(fusion: Fusion) -> float | dict[str, float | None] | None:
    """gamma as one number, by component where there are several, None where it is undefined."""
    derived = fusion.rule.derived.get("gamma")
    if not isinstance(derived, Mapping):
        return None
    if len(derived) > 1:
        return dict(derived)
    return next(iter(derived.values()), None)


def near_ties(fusion: Fusion) -> Iterator[NearTie]:
    """Layers whose decision is near a tie.

    A breakpoint within 1e-6 of the progress of some step of some N up to 100, or a ratio within
    1e-6 of the ends of S's range.
    """
    for entry in fusion.entries:
        for start in entry.timeline.starts[1:]:
            step = near_step(start)
            if step is not None:
                index, steps = step
                yield NearTie(entry.layer, f"switches at {start:.9g}, step {index} of {steps}")
        end = _near_end(fusion, entry)
        if end is not None:
            yield NearTie(entry.layer, f"its ratio is {end:g}, an end of S's range")


def klora_of(fusion: Fusion) -> Klora | None:
    """The rule that made a fusion, or None where it is another one or its settings are unknown."""
    if fusion.rule.name != "klora":
        return None
    try:
        return klora_rule(Config.from_parameters(fusion.rule.parameters))
    except (ConfigError, TypeError):
        return None


def _near_end(fusion: Fusion, entry: Entry) -> float | None:
    ratio = entry.scores.get("klora", {}).get("ratio")
    rule = klora_of(fusion)
    return None if ratio is None or rule is None else near_range_end(ratio, rule.range())


def summary_lines(summary: Summary) -> list[tuple[str, str]]:
    """The summary as rows of (label, text) for a terminal."""
    settings = summary.settings
    rows = [("base model", family_name(summary.family))]
    rows.append(("rule", shown(f"{summary.rule}, {_rule_text(settings)}")))
    rows.append(("gamma", gamma_text(summary.gamma)))
    total = sum(summary.fates.values())
    for position, (fate, count) in enumerate(summary.fates.items()):
        if count or fate not in ("with its weight", "constant", "dropped"):
            rows.append((f"layers ({total})" if position == 0 else "", f"{count:>5} {fate}"))
    rows.append(("near ties", str(len(summary.near_ties))))
    rows.extend(("", f"{shown(tie.layer)}: {tie.why}") for tie in summary.near_ties[:3])
    if len(summary.near_ties) > 3:
        rows.append(("", "… all of them with --json"))
    rows.append(("ranks", _by_slot({s: ranks_text(r) for s, r in summary.ranks.items()})))
    return rows


def bytes_text(count: int) -> str:
    """A number of bytes for people, in decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Rows of (label, text), the labels in one column."""
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"  {label:<{width}}  {text}" for label, text in rows)


def _rule_text(settings: Mapping[str, Any]) -> str:
    parts = [f"pattern {settings.get('pattern')}", f"{settings.get('semantics')} semantics"]
    numbers = {name: settings.get(name) for name in ("alpha", "beta")}
    parts += [f"{k} {v:g}" for k, v in numbers.items() if isinstance(v, int | float)]
    return ", ".join(parts)


def gamma_text(gamma: float | Mapping[str, float | None] | None) -> str:
    """gamma for people, made safe for a terminal."""
    if isinstance(gamma, Mapping):
        return ", ".join(f"{shown(name)} {gamma_text(value)}" for name, value in gamma.items())
    return "undefined (no layer needs it)" if gamma is None else f"{gamma:.6g}"


def ranks_text(ranks: Sequence[int]) -> str:
    """Distinct ranks for people; the ends alone where they are many."""
    if len(ranks) > 4:
        return f"{ranks[0]}…{ranks[-1]}"
    return "/".join(map(str, ranks))


def _by_slot(texts: Mapping[str, str]) -> str:
    return ", ".join(f"{shown(slot)} {text}" for slot, text in texts.items())
