"""Statistics of verdicts: per rule a mean over pictures with an interval over subjects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from drawings.evaluation.scores import Interval, bootstrap
from klora_compile.report.table import markdown_table

#: One rule's verdicts: "subject, style" -> one verdict per seed, as JSON.
Verdicts = Mapping[str, Sequence[Mapping[str, float]]]


@dataclass(frozen=True)
class Measure:
    """A number in verdicts, and its format."""

    key: str
    """Key in a verdict."""
    heading: str
    higher_is_better: bool = True
    percent: bool = False

    def text(self, value: float) -> str:
        return f"{100 * value:.0f} %" if self.percent else f"{value:.2f}"


MEASURES = (
    Measure("both", "both (harmonic mean)"),
    Measure("subject", "subject"),
    Measure("style", "style"),
    Measure("distance", "distance to the true drawing", higher_is_better=False),
    Measure("right_subject", "nearest: subject", percent=True),
    Measure("right_style", "nearest: style", percent=True),
    Measure("right_both", "nearest: both", percent=True),
)


def by_subject(verdicts: Verdicts, key: str) -> dict[str, float]:
    """Return subject -> mean of a number over its styles and seeds."""
    values: dict[str, list[float]] = {}
    for pair, found in verdicts.items():
        values.setdefault(pair.partition(",")[0], []).extend(each[key] for each in found)
    return {subject: sum(each) / len(each) for subject, each in values.items()}


def interval(verdicts: Verdicts, key: str) -> Interval:
    """Return the mean over subjects with its interval."""
    return bootstrap(list(by_subject(verdicts, key).values()))


def difference(verdicts: Verdicts, other: Verdicts, key: str) -> Interval:
    """Return the mean over subjects of one rule's number minus another's, with its interval."""
    here, there = by_subject(verdicts, key), by_subject(other, key)
    return bootstrap([here[subject] - there[subject] for subject in here])


def best(rules: Mapping[str, Verdicts], key: str = "both") -> str:
    """Return the rule with the highest mean, the first of equals."""
    return max(rules, key=lambda name: interval(rules[name], key).mean)


def markdown(rules: Mapping[str, Verdicts], reference: str) -> str:
    """Return a table: a row per rule, mean and 95 % interval.

    Args:
        rules: rule -> verdicts, in the order of the rows.
        reference: the rule that the last column compares with.
    """
    heads = ["rule", *(measure.heading for measure in MEASURES), f"both, minus {reference}"]
    rows = []
    for name, verdicts in rules.items():
        cells = [name]
        for measure in MEASURES:
            found = interval(verdicts, measure.key)
            cells.append(_cell(found, measure.text))
        apart = difference(verdicts, rules[reference], "both")
        cells.append("" if name == reference else _cell(apart, "{:+.2f}".format))
        rows.append(cells)
    return markdown_table(heads, rows) + "\n"


def _cell(found: Interval, text: Callable[[float], str]) -> str:
    low, high = text(found.low).removesuffix(" %"), text(found.high)
    return f"{text(found.mean)} ({low} to {high})"
