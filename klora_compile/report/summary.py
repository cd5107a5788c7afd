"""The summary of a fusion: layers by fate, near ties, gamma, ranks, bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from klora_compile.report.fates import COMMON, QUIET
from klora_compile.report.few_steps import FewSteps, few_steps
from klora_compile.report.scores import number_of
from klora_compile.report.truncation import Truncation, truncations
from klora_compile.rules.lookup import known_rule
from klora_compile.rules.rule import Rule
from klora_compile.runs import Run, runs_of
from klora_compile.settings.calibration import Calibration
from klora_compile.settings.config import CALIBRATED, PICKED, Picked
from klora_compile.slots import HALVES
from klora_runtime.artifact.schedule import ALWAYS, Schedule
from klora_runtime.artifact.timeline import ClockName
from klora_runtime.errors import shown
from klora_runtime.families.catalogue import families_name, family_name
from klora_runtime.linking.breakpoints import near_range_end


@dataclass(frozen=True)
class NearTie:
    """A layer whose choice might flip by rounding, at some step of some number of steps."""

    layer: str
    why: str


@dataclass(frozen=True)
class Summary:
    """Numbers about one fusion, from the fusion alone."""

    family: str | None
    families: tuple[str, ...]
    """The base models that it may be for, if there are several; ``family`` is None then."""
    rule: str
    rule_text: str
    """The rule's own settings in a few words; empty if this klora does not know the rule."""
    settings: Mapping[str, Any]
    """The rule's parameters."""
    gamma: float | Mapping[str, float | None] | None
    """One number for one component, else component -> number; None for rules without gamma."""
    derived: Mapping[str, Any]
    """All numbers that the rule computed for the whole model."""
    fates: Mapping[str, int]
    """Fate -> number of layers; all the rule's own fates come first, even with 0 layers."""
    clock: ClockName
    """What the progress of the schedule follows."""
    shifts: tuple[float, ...]
    """Shifts of the runs that :attr:`near_ties` and :attr:`few_steps` assume; empty by the clock of
        the steps, which needs none."""
    few_steps: tuple[FewSteps, ...]
    always: Mapping[str, int]
    """Slot of a LoRA that always acts -> number of layers in which it does."""
    truncations: tuple[Truncation, ...]
    """What merged slots lost to their rank; empty without one."""
    near_ties: tuple[NearTie, ...]
    ranks: Mapping[str, tuple[int, ...]]
    """Source -> its distinct ranks."""
    bytes_in: Mapping[str, int]
    """Source -> size of its file in bytes."""

    def json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        fields = asdict(self)
        names = {"name": "rule", "parameters": "settings", "text": "rule_text"}
        rule = {name: fields.pop(field) for name, field in names.items()}
        return {"rule": rule, **fields}


def summarise(fusion: Schedule, shift: float | None = None) -> Summary:
    """Return the summary of a compiled or loaded fusion.

    Args:
        fusion: the fusion.
        shift: see :func:`~klora_compile.runs.runs_of`.

    Raises:
        ConfigError: see :func:`~klora_compile.runs.runs_of`.
    """
    runs = runs_of(fusion.clock, shift)
    counts = Counter(entry.fate for entry in fusion.entries)
    rule = rule_of(fusion)
    common = [fate for fate in COMMON if rule is None or not rule.whole or fate != "one-sided"]
    fates = dict.fromkeys((*(() if rule is None else rule.fates), *common, *sorted(counts)))
    return Summary(
        family=fusion.family,
        families=fusion.families,
        rule=fusion.rule.name,
        rule_text="" if rule is None else rule.text(),
        settings=dict(fusion.rule.parameters),
        gamma=gamma_of(fusion),
        derived=dict(fusion.rule.derived),
        fates={fate: counts[fate] for fate in fates},
        clock=fusion.clock,
        shifts=tuple(run.shift for run in runs if run.shift is not None),
        few_steps=few_steps(fusion, runs),
        always={
            name: sum(1 for entry in fusion.entries if entry.timeline.uses(name))
            for name, slot in fusion.slots.items()
            if slot.role == ALWAYS
        },
        truncations=tuple(truncations(fusion)),
        near_ties=tuple(near_ties(fusion, runs)),
        ranks={name: source.ranks for name, source in fusion.sources.items()},
        bytes_in={name: source.bytes for name, source in fusion.sources.items()},
    )


def gamma_of(fusion: Schedule) -> float | dict[str, float | None] | None:
    """Return gamma as one number, or by component if there are several; None if undefined."""
    derived = fusion.rule.derived.get("gamma")
    if not isinstance(derived, Mapping):
        return None
    if len(derived) > 1:
        return dict(derived)
    return next(iter(derived.values()), None)


def near_ties(fusion: Schedule, runs: Sequence[Run]) -> Iterator[NearTie]:
    """Yield the layers whose decision is near a tie.

    A near tie is a breakpoint within 1e-6 of the progress of a step for some N up to 100 in one of
    the runs, or a ratio within 1e-6 of an end of S's range. Rules that compare nothing have none.
    """
    rule = rule_of(fusion)
    ends = None if rule is None else rule.range()
    if ends is None:
        return
    for entry in fusion.entries:
        for start in entry.timeline.starts[1:]:
            for run in runs:
                if (step := run.near(start)) is not None:
                    place = filter(None, (f"step {step[0]} of {step[1]}", run.text))
                    yield NearTie(entry.layer, f"switches at {start:.9g}, {', '.join(place)}")
        ratio = number_of(fusion, entry, "ratio")
        end = None if ratio is None else near_range_end(ratio, ends)
        if end is not None:
            yield NearTie(entry.layer, f"its ratio is {end:g}, an end of S's range")


def rule_of(fusion: Schedule) -> Rule | None:
    """Return the rule that made a fusion; None if this klora does not know it or its settings."""
    return known_rule(fusion.rule.name, fusion.rule.parameters)


def _base_model(summary: Summary) -> str:
    return families_name(summary.families) if summary.families else family_name(summary.family)


def summary_lines(summary: Summary) -> list[tuple[str, str]]:
    """Return the summary as rows of (label, text) for a terminal."""
    words = ", ".join(filter(None, (summary.rule, summary.rule_text)))
    rows = [("base model", _base_model(summary)), ("rule", shown(words))]
    picked = Picked.from_parameters(summary.settings.get(PICKED))
    if picked is not None:
        rows.append(("picked", shown(f"by rule {picked.by}: {picked.why}")))
    calibration = Calibration.from_parameters(summary.settings.get(CALIBRATED))
    if calibration is not None:
        rows.append(("calibrated", shown(calibration.text)))
    rows.append(("clock", _clock_text(summary)))
    for name, value in summary.derived.items():
        rows.append((shown(name), gamma_text(summary.gamma if name == "gamma" else value)))
    total = sum(summary.fates.values())
    listed = [(fate, n) for fate, n in summary.fates.items() if n or fate not in QUIET]
    for position, (fate, count) in enumerate(listed):
        rows.append((f"layers ({total})" if position == 0 else "", f"{count:>5} {shown(fate)}"))
    rows.extend(("" if i else "few steps", few.text) for i, few in enumerate(summary.few_steps))
    for slot, count in summary.always.items():
        rows.append(("always", f"{shown(slot)} in {count} layers{_weight_of(summary, slot)}"))
    rows.extend(("truncation", each.text) for each in summary.truncations)
    rows.append(("near ties", str(len(summary.near_ties))))
    rows.extend(("", f"{shown(tie.layer)}: {tie.why}") for tie in summary.near_ties[:3])
    if len(summary.near_ties) > 3:
        rows.append(("", "… --json lists all"))
    rows.append(("ranks", _by_slot({s: ranks_text(r) for s, r in summary.ranks.items()})))
    return rows


def _clock_text(summary: Summary) -> str:
    if not summary.shifts:
        return summary.clock
    assumed = " and ".join(f"{shift:g}" for shift in summary.shifts)
    return f"{summary.clock}; what is said of steps assumes a schedule of shift {assumed}"


def _weight_of(summary: Summary, slot: str) -> str:
    """Return the weight of a slot as text; empty if none was set."""
    weights = summary.settings.get("weights")
    named = (slot, *(f"{slot}.{half}" for half in HALVES))
    stated = [weights.get(name) if isinstance(weights, Mapping) else None for name in named]
    whole, high, low = (weight if isinstance(weight, int | float) else None for weight in stated)
    if high is None and low is None:
        return "" if whole is None else f", weight {whole:g}"
    own, *halves = (1.0 if weight is None else weight for weight in (whole, high, low))
    first, second = (own * half for half in halves)
    return f", weight {first:g} for high and {second:g} for low noise"


def bytes_text(count: int) -> str:
    """Return a number of bytes as text, in decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def gamma_text(gamma: Any) -> str:
    """Return gamma, or another number of the whole model, as text that is safe for a terminal."""
    if isinstance(gamma, Mapping):
        return ", ".join(f"{shown(name)} {gamma_text(value)}" for name, value in gamma.items())
    if gamma is None:
        return "undefined (no layer needs it)"
    return f"{gamma:.6g}" if isinstance(gamma, int | float) else shown(gamma)


def ranks_text(ranks: Sequence[int]) -> str:
    """Return distinct ranks as text; only the least and greatest if there are many."""
    if len(ranks) > 4:
        return f"{ranks[0]}…{ranks[-1]}"
    return "/".join(map(str, ranks))


def _by_slot(texts: Mapping[str, str]) -> str:
    return ", ".join(f"{shown(slot)} {text}" for slot, text in texts.items())
