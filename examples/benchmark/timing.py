"""Medians, intervals and paired ratios of times that were taken in turns."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from klora_runtime.devices.device_types import type_of

_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A median and the 95 % bootstrap interval around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Of at least one value; the same values give the same interval."""
        chance = random.Random(0)
        medians = sorted(
            statistics.median(chance.choices(values, k=len(values))) for _ in range(_RESAMPLES)
        )
        low, high = medians[int(0.025 * _RESAMPLES)], medians[int(0.975 * _RESAMPLES)]
        return cls(statistics.median(values), low, high)


def ratios(times: Sequence[float], bare: Sequence[float]) -> list[float]:
    """Of two rows' times, each to the other's of the same round."""
    return [one / other for one, other in zip(times, bare, strict=True)]


def turns(count: int, rounds: int) -> Iterator[list[int]]:
    """The order of ``count`` rows in each round: all of them once, shuffled, always alike.

    A machine that slows down slows down all rows, and none always follows the same other one.
    """
    chance = random.Random(0)
    for _ in range(rounds):
        order = list(range(count))
        chance.shuffle(order)
        yield order


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until ``work`` is done on the device too."""
    wait = partial(type_of(device).synchronise, device)
    wait()
    begin = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begin
