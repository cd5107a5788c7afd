"""Medians, intervals and paired ratios of times that were measured in turns."""

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
    """A median with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Return the interval of one or more values; equal values give equal intervals."""
        chance = random.Random(0)
        medians = sorted(
            statistics.median(chance.choices(values, k=len(values))) for _ in range(_RESAMPLES)
        )
        low, high = medians[int(0.025 * _RESAMPLES)], medians[int(0.975 * _RESAMPLES)]
        return cls(statistics.median(values), low, high)


def ratios(times: Sequence[float], bare: Sequence[float]) -> list[float]:
    """Return the ratios of two rows' times, round by round."""
    return [one / other for one, other in zip(times, bare, strict=True)]


def turns(count: int, rounds: int) -> Iterator[list[int]]:
    """Yield the order of ``count`` rows in each round: each once, in a reproducible shuffle.

    So a machine that slows down affects all rows, and no row always follows the same other row.
    """
    chance = random.Random(0)
    for _ in range(rounds):
        order = list(range(count))
        chance.shuffle(order)
        yield order


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds until ``work`` is finished, also on the device."""
    wait = partial(type_of(device).synchronise, device)
    wait()
    begin = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begin
