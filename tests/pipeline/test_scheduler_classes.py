"""Every scheduler class of diffusers by the clock of the noise, and the table of them in the docs.

Each way to set timesteps is compared with the literal reference, from the first step and from the
middle of the list.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
from reference import progress_of_run
from support import scheduler_classes
from support.page_table import PageTable, as_text
from support.scheduler_classes import Variant, made, set_timesteps, variants

from klora_runtime.errors import IncompatibleModelError
from klora_runtime.pipeline.clock import Clock
from klora_runtime.pipeline.noise_levels import noise_level_of, progress_by_noise
from klora_runtime.pipeline.occupancy import Occupancy

NAMES = scheduler_classes.names()

#: Ways to space timesteps, and lists of one's own.
SPACINGS = ("Karras", "exponential", "beta", "Lu", "inverted", "flow")
LISTS = ("timesteps=", "sigmas=")

#: Classes without a clock of the noise, each with a word of the reason.
REFUSED = {
    "AmusedScheduler": "replaces tokens",
    "BlockRefinementScheduler": "replaces tokens",
    "DDIMInverseScheduler": "from the picture to noise",
    "DPMSolverMultistepInverseScheduler": "from the picture to noise",
    "DiscreteDDIMScheduler": "replaces tokens",
    "EntropyBoundScheduler": "replaces tokens",
    "KarrasVeScheduler": "adds noise inside a step",
    "RePaintScheduler": "goes back to more noise",
    "ScoreSdeVeScheduler": "it has no step",
    "ScoreSdeVpScheduler": "it has no step",
    "VQDiffusionScheduler": "replaces tokens",
}
FOLLOWED = [name for name in NAMES if name not in REFUSED]


def ready(name: str, variant: Variant) -> tuple[Any, Clock]:
    """A scheduler with its timesteps set, under a clock of the noise."""
    scheduler = made(name, variant)
    clock = Clock(lambda _: None, Occupancy())
    clock.name = "noise"
    clock.attach(scheduler)
    set_timesteps(scheduler, name, variant)
    return scheduler, clock


def seen(clock: Clock, timesteps: Any) -> Iterator[float | None]:
    """Progress at each evaluation of a loop over these timesteps."""
    for timestep in timesteps:
        clock.evaluate(timestep)
        yield clock.progress


def test_no_class_of_diffusers_is_missing() -> None:
    exported = {name for name in dir(diffusers) if name.endswith("Scheduler")}
    assert exported <= {*NAMES, "CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"}
    assert REFUSED.keys() <= set(NAMES)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name: str) -> None:
    clock = Clock(lambda _: None, Occupancy())
    clock.name = "noise"
    with pytest.raises(IncompatibleModelError, match=f"this {name} .*{REFUSED[name]}"):
        clock.attach(made(name))


@pytest.mark.parametrize("name", FOLLOWED)
def test_progress_is_what_the_reference_says(name: str) -> None:
    """In each variant, from the first step, and where image to image begins."""
    for variant in variants(name):
        scheduler, clock = ready(name, variant)
        expected = progress_of_run(
            scheduler, "noise", variant.level, lists_the_end=variant.lists_the_end
        )
        timesteps = scheduler.timesteps[: len(expected)]
        assert list(seen(clock, timesteps)) == pytest.approx(expected, abs=1e-6), variant.name
        order = max(1, getattr(scheduler, "order", 1))
        start = order * (len(expected) // order // 2)
        set_timesteps(scheduler, name, variant)
        found = list(seen(clock, scheduler.timesteps[start : len(expected)]))
        assert found == pytest.approx(expected[start:], abs=1e-6), variant.name
        assert all(0 <= one <= other < 1 for one, other in pairwise(expected)), variant.name
        tabled = hasattr(scheduler, "alphas_cumprod") and hasattr(scheduler, "sigmas")
        if tabled and variant.level == "training":
            require_indices(scheduler, variant.name)


def require_indices(scheduler: Any, why: str) -> None:
    """The noise of the training at each timestep is the scheduler's own sigma there."""
    kept = scheduler.alphas_cumprod.double().numpy()
    noise = np.log((1 - kept) / kept) / 2
    for place in range(0, len(scheduler.timesteps), scheduler.order):
        index = np.interp(np.log(scheduler.sigmas[place]), noise, np.arange(len(noise)))
        # Some round to whole timesteps; some interpolate sigma, not its logarithm.
        assert float(scheduler.timesteps[place]) == pytest.approx(index, abs=1.0), why


# --- the table ----------------------------------------------------------------------------------

TABLE = PageTable("schedulers", "clocks.md")


def rows() -> Iterator[str]:
    yield (
        "| class | noise level | progress of 4 steps, in percent | spacings of sigmas | trailing "
        "| own lists | image to image |"
    )
    yield "|" + "---|" * 7
    for name in NAMES:
        yield f"| {name.removesuffix('Scheduler')} | {' | '.join(cells(name))} |"


def cells(name: str) -> list[str]:
    if name in REFUSED:
        return [f"refused: {REFUSED[name]}", *([""] * 5)]
    every = list(variants(name))
    scheduler, _ = ready(name, every[0])
    moments = " ".join(f"{100 * moment:.0f}" for moment in progress_by_noise(scheduler))
    words = [variant.name for variant in every]
    return [
        noise_level_of(scheduler).text,
        moments,
        ", ".join(word for word in words if word in SPACINGS),
        "yes" if "trailing" in words else "",
        ", ".join(f"`{word}`" for word in words if word in LISTS),
        "yes",
    ]


def test_the_table_in_the_docs_is_what_is_tested() -> None:
    """Run this file as a program to write it anew."""
    assert TABLE.read() == as_text(rows())


if __name__ == "__main__":
    TABLE.write(rows())
