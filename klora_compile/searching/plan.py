"""What a search is to do: candidates, the cases that they are scored on, the judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from klora_compile.calibrating.pictures import OwnPictures, prompts_of
from klora_compile.judging.judge import OWN_PICTURES, Judge, judge_named, name_of
from klora_compile.judging.own_pictures import OwnPicturesJudge
from klora_compile.reading.adapter import Adapter
from klora_compile.rules.lookup import usual_rule
from klora_compile.searching.halving import rounds_of
from klora_compile.searching.space import (
    CASES,
    PROMPT,
    SEED,
    Candidate,
    Case,
    baseline,
    candidates_of,
    usual_axes,
)
from klora_compile.slots import scheduled, slots_of
from klora_compile.sweeping.axes import CELLS, axes_of
from klora_compile.trying.names import LAST_SEED, RULE
from klora_runtime.errors import ConfigError

#: Seeds of each prompt, if none are named.
_SEEDS = 8


@dataclass(frozen=True)
class Plan:
    """Everything that a search is to do."""

    candidates: Sequence[Candidate]
    baseline: Candidate
    """The plain sum."""
    common: Mapping[str, Any]
    """Settings that all candidates share."""
    prompts: Sequence[str]
    """Different ones."""
    seeds: Sequence[int]
    """Different ones."""
    judge: Judge
    judge_name: str
    own_prompts: Mapping[str, Sequence[str]]
    """Slot -> prompts that show its LoRA alone; empty to make no such pictures."""
    own: OwnPictures
    """Count, seed and settings of such pictures."""
    best: int
    """How many candidates the sheets show, and the last round has."""
    checked: bool
    """Whether to score the best candidate and the plain sum on further seeds."""

    @property
    def shared(self) -> dict[str, Any]:
        """What all pictures have in common."""
        alone = {PROMPT: self.prompts[0]} if len(self.prompts) == 1 else {}
        return {**self.common, **alone}

    @property
    def blocks(self) -> list[list[Case]]:
        """All cases, in blocks of two or more: no candidate is dropped after one picture."""
        step = 1 if len(self.prompts) > 1 else 2
        parts = [self.seeds[first : first + step] for first in range(0, len(self.seeds), step)]
        return [[(prompt, seed) for seed in part for prompt in self.prompts] for part in parts]

    @property
    def cases(self) -> list[Case]:
        """Prompts and seeds that every candidate of the last round is scored on."""
        return [case for block in self.blocks for case in block]

    @property
    def fresh(self) -> list[Case]:
        """As many cases, with seeds that follow those of the search."""
        first = max(self.seeds) + 1
        seeds = range(first, first + len(self.seeds))
        return [(prompt, seed) for seed in seeds for prompt in self.prompts]

    @property
    def pictures(self) -> int:
        """How many pictures a search makes, if none fails."""
        blocks, done = self.blocks, 0
        count = len(self.own_prompts) * self.own.count
        for now in rounds_of(len(self.candidates), len(blocks), self.best):
            cases = sum(len(block) for block in blocks[done : now.blocks])
            count += (now.candidates + 1) * cases
            done = now.blocks
        return count + (2 * len(self.fresh) if self.checked else 0)


def plan_of(
    values: Mapping[str, Sequence[Any]],
    adapters: Mapping[str, Adapter],
    *,
    count: int,
    judge: Judge | str,
    own: OwnPictures,
    seed: int,
    best: int,
    checked: bool,
) -> Plan:
    """Return what a search is to do.

    Args:
        values: name of a setting -> its values. ``prompt`` and ``seed`` are the cases, others with
            several values the axes; without any, rule, bias and weights are.
        adapters: source -> LoRA.
        count: how many candidates are drawn.
        judge: a judge, or its name.
        own: the pictures of each LoRA alone. They are made if it has prompts, or if the judge
            compares with them.
        seed: of the drawing of candidates.
        best: how many candidates the sheets show.
        checked: see :class:`Plan`.

    Raises:
        ConfigError: a setting is wrong, the judge is unknown, or a prompt is missing.
        KloraError: the judge cannot be loaded.
    """
    _refuse_counts(search=count, best=best)
    slots = scheduled(slots_of(adapters))
    cases = {PROMPT: values.get(PROMPT, ()), SEED: values.get(SEED, range(_SEEDS))}
    prompts, seeds = ([v.settings[each.name] for v in each.values] for each in axes_of(cases))
    others = {name: each for name, each in values.items() if name not in CASES}
    axes = {name: each for name, each in others.items() if len(each) > 1 or name == CELLS}
    base = {name: each[0] for name, each in others.items() if name not in axes}
    base |= {PROMPT: prompts[0], SEED: seeds[0]}
    if checked:
        _refuse_last_seeds(seeds)
    if not axes:
        axes |= usual_axes(slots, base)
    if RULE not in axes:
        base.setdefault(RULE, usual_rule(len(slots)))
    candidates = candidates_of(axes, base, count, seed)
    wanted = own.prompts or _compares(judge, slots)
    return Plan(
        candidates,
        baseline(base),
        {name: value for name, value in base.items() if name not in CASES},
        prompts,
        seeds,
        judge_named(judge) if isinstance(judge, str) else judge,
        name_of(judge),
        prompts_of(own, slots, adapters, who="the judge", option="--own-prompt") if wanted else {},
        own,
        best,
        checked,
    )


def _compares(judge: Judge | str, slots: Sequence[str]) -> bool:
    """Return whether a judge compares with pictures of each LoRA alone; refuse it for one LoRA."""
    compares = judge == OWN_PICTURES or isinstance(judge, OwnPicturesJudge)
    if compares and len(slots) < 2:
        raise ConfigError(
            f"judge: {OWN_PICTURES} compares LoRAs with each other, and there is one. Name another "
            "LoRA, or a judge of your own."
        )
    return compares


def _refuse_counts(**counts: object) -> None:
    """Refuse what is no whole number from 1."""
    for name, number in counts.items():
        if type(number) is not int or number < 1:
            raise ConfigError(f"{name}: expected a whole number from 1, found {number!r}.")


def _refuse_last_seeds(seeds: Sequence[int]) -> None:
    """Refuse seeds that as many further ones cannot follow."""
    last = LAST_SEED - len(seeds)
    if max(seeds) > last:
        raise ConfigError(
            f"seed: a search compares the best candidate on {len(seeds)} further seeds; name seeds "
            f"up to {last}, found {max(seeds)}."
        )
