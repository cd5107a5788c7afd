"""The settings that a search chooses among."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest
from typing import Any

from klora_compile.rules.kit.calibrated import Calibrated
from klora_compile.rules.lookup import RULES
from klora_compile.sweeping.axes import CELLS, Axis, Value, axes_of, words
from klora_compile.sweeping.grid import Cell, plain_sum
from klora_compile.trying.names import RULE, SAMPLING, WEIGHT, flattened, split
from klora_compile.trying.trial import idle, trial_of
from klora_runtime.errors import ConfigError

#: Settings of the sampling whose several values are the cases of every candidate.
PROMPT, SEED = CASES = ("prompt", "seed")

#: Prompt and seed of a picture.
Case = tuple[str, int]

#: Combinations of values that a search draws from.
_MOST = 100_000

#: Values that a search tries if no setting has several.
_BIASES, _WEIGHTS = (-0.3, 0.0, 0.3), (0.7, 1.0, 1.4)


@dataclass(frozen=True, eq=False)
class Candidate:
    """Settings of a fusion."""

    label: str
    settings: Mapping[str, Any]
    """By full name, with those that all candidates share; without prompt and seed."""


def usual_axes(slots: Sequence[str], base: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Return axes for a search that names none: rule, bias, and a weight for each LoRA.

    Args:
        slots: slots of the LoRAs that a rule schedules.
        base: settings of all candidates with one value each, a prompt among them.
    """
    rules = tuple(
        name
        for name, kind in RULES.items()
        if kind.least <= len(slots) and not issubclass(kind, Calibrated) and _suffice(name, base)
    )
    axes: dict[str, tuple[Any, ...]] = {RULE: rules}
    asked = (base[RULE],) if RULE in base else rules
    if any("bias" not in idle({**base, RULE: rule, "bias": 0.0}) for rule in asked):
        axes["bias"] = _BIASES
    axes |= {f"{WEIGHT}.{slot}": _WEIGHTS for slot in slots}
    return {name: values for name, values in axes.items() if name not in base}


def _suffice(rule: str, base: Mapping[str, Any]) -> bool:
    """Return whether a rule needs no settings but these."""
    whole = {**base, RULE: rule}
    try:
        trial_of({name: value for name, value in whole.items() if name not in idle(whole)})
    except ConfigError:
        return False
    return True


def baseline(base: Mapping[str, Any]) -> Candidate:
    """Return the plain sum with those settings of all candidates that it can have.

    Args:
        base: settings of all candidates.
    """
    return Candidate("direct sum", _without_cases(plain_sum(flattened(base))))


def candidates_of(
    axes: Mapping[str, Iterable[Any]], base: Mapping[str, Any], count: int, seed: int
) -> tuple[Candidate, ...]:
    """Return different candidates, drawn at random; the rules take turns.

    Args:
        axes: name of a setting -> values; ``cells`` -> mappings with settings each.
        base: settings of all candidates, with a prompt.
        count: how many at most, at least 1.
        seed: of the drawing.

    Raises:
        ConfigError: a setting is unknown, out of its range, of the sampling, or acts in no
            candidate; or nothing is left beside the plain sum.
    """
    base = flattened(base)
    case = {name: value for name, value in base.items() if name in CASES}
    found = axes_of(axes, most=None)
    _refuse_sampling(found)
    _refuse_too_many(found)
    every = list(_every(found, base))
    _refuse_idle([*_named(found), *base], every)
    seen = {trial_of({**baseline(base).settings, **case}).key}
    by_rule: dict[str, list[Candidate]] = {}
    for candidate in every:
        trial = trial_of({**candidate.settings, **case})
        if trial.key not in seen:
            seen.add(trial.key)
            by_rule.setdefault(trial.config.rule.name, []).append(candidate)
    if not by_rule:
        raise ConfigError("a search has nothing but the plain sum to try; name more values.")
    chance = random.Random(seed)
    groups = list(by_rule.values())
    chance.shuffle(groups)
    for own in groups:
        chance.shuffle(own)
    turns = (each for turn in zip_longest(*groups) for each in turn)
    return tuple(each for each in turns if each is not None)[:count]


def cell_of(candidate: Candidate, case: Case) -> Cell:
    """Return the cell of a candidate's picture, in no place of a sheet.

    Raises:
        ConfigError: a setting is out of its range.
    """
    settings = {**candidate.settings, PROMPT: case[0], SEED: case[1]}
    name = f"{candidate.label}, {SEED} {case[1]}"
    return Cell(0, 0, 0, name, settings, trial_of(settings))


def _every(axes: Sequence[Axis], base: Mapping[str, Any]) -> Iterator[Candidate]:
    """Yield a candidate for each combination, without settings that its rule does not have."""
    for values in product(*(axis.values for axis in axes)):
        whole = {**base, **{n: each for value in values for n, each in value.settings.items()}}
        unused = idle(whole)
        kept = {
            name: each
            for name, each in whole.items()
            if name not in unused and not _is_default(name, each)
        }
        acting = whole.keys() - unused
        label = _label(axes, values, kept) or _label(axes, values, acting)
        yield Candidate(label or words({RULE: whole[RULE]}), _without_cases(kept))


def _label(axes: Sequence[Axis], values: Sequence[Value], said: Collection[str]) -> str:
    """Return the label of a combination, with these of its settings."""
    parts = (
        value.label
        if axis.name == CELLS
        else words({name: each for name, each in value.settings.items() if name in said})
        for axis, value in zip(axes, values, strict=True)
    )
    return ", ".join(filter(None, parts))


def _is_default(name: str, value: Any) -> bool:
    """Return whether a setting is a weight of 1, which is as if it was not named."""
    return split(name)[0] == WEIGHT and value == 1


def _without_cases(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in CASES}


def _named(axes: Sequence[Axis]) -> list[str]:
    return [name for axis in axes for value in axis.values for name in value.settings]


def _refuse_sampling(axes: Sequence[Axis]) -> None:
    """Refuse settings of the sampling: candidates are fusions, which are sampled alike."""
    for name in _named(axes):
        if name in SAMPLING:
            raise ConfigError(
                f"{name}: a search compares fusions that are sampled alike; name one value."
            )


def _refuse_too_many(axes: Sequence[Axis]) -> None:
    count = math.prod(len(axis.values) for axis in axes)
    if count > _MOST:
        raise ConfigError(
            f"a search draws from at most {_MOST} combinations of values, found {count}; name "
            "fewer values."
        )


def _refuse_idle(names: Iterable[str], candidates: Sequence[Candidate]) -> None:
    """Refuse settings that no rule of the search has."""
    acting = {name for candidate in candidates for name in candidate.settings}
    for name in names:
        if name not in acting and split(name)[0] not in (WEIGHT, *CASES):
            raise ConfigError(
                f"{name}: no rule of this search has this setting; leave it out, or name a rule "
                "that has it."
            )
