"""Many LoRAs into one store, by an engine; and again those that lack what a new partner needs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from klora_compile.engines import Engine, results
from klora_compile.halves import Halves
from klora_compile.profiles.once import PARTNERS
from klora_compile.profiles.profile import Profile
from klora_compile.profiles.profiling import Files, Result, Task, keep, lacks, profiled
from klora_compile.profiles.store import Store
from klora_compile.settings.read_options import ReadOptions
from klora_compile.slots import HIGH, LOW

#: Called after each LoRA with its result, the number of finished ones, and the total.
OnLora = Callable[[Result, int, int], None]


@dataclass(frozen=True)
class Gathered:
    """What became of LoRAs that were to be profiled."""

    results: tuple[Result, ...]
    """Of the named LoRAs, in their order."""
    again: tuple[Result, ...] = field(default=())
    """Of other LoRAs of the store that were read again for new partners."""


def gather(
    loras: Collection[Files],
    store: Store,
    *,
    options: ReadOptions,
    device: str,
    engine: Engine | None,
    on_lora: OnLora | None = None,
) -> Gathered:
    """Profile LoRAs, and read again those of the store that lack what new ranks need.

    Whatever stops this, what is finished is kept, and the next run goes on from there.

    Args:
        loras: the LoRAs.
        store: the store.
        options: how to read them.
        device: name of the device that measures.
        engine: where to work; None for this process.
        on_lora: see :data:`OnLora`.
    """
    before = partners_in(store)
    tasks = [Task(lora, options, device, store.folder, before) for lora in loras]
    found = list(_run(tasks, store, engine, on_lora))
    order = {str(lora): number for number, lora in enumerate(loras)}
    found.sort(key=lambda result: order[str(result.lora)])
    after = partners_in(store)
    again: list[Result] = []
    if after != before:
        lacking = lacking_of(store, store.profiles(), after)
        again = list(_run(tasks_of(lacking, store, device, after), store, engine, on_lora))
    return Gathered(tuple(found), tuple(again))


def partners_in(store: Store) -> tuple[int, ...]:
    """Return the ranks whose partners a profile should suit: usual ones, and those of the store."""
    return tuple(sorted({*PARTNERS, *(rank for each in store.profiles() for rank in each.ranks)}))


def lacking_of(
    store: Store,
    profiles: Iterable[Profile],
    partners: tuple[int, ...],
    counts: tuple[int, ...] = (),
) -> list[Profile]:
    """Return the profiles whose statistics lack sums, or are damaged."""
    found = []
    for profile in profiles:
        statistics = store.statistics(profile.statistics)
        if statistics is None or lacks(profile, statistics, partners, counts):
            found.append(profile)
    return found


def tasks_of(
    profiles: Iterable[Profile],
    store: Store,
    device: str,
    partners: tuple[int, ...],
    counts: tuple[int, ...] = (),
) -> list[Task]:
    """Return the tasks that read the LoRAs of profiles again, from where and as they were read."""
    ids = {profile.lora for profile in profiles}
    by_lora: dict[str, dict[str | None, Profile]] = {}
    for profile in store.profiles():  # both halves of a LoRA are read together
        if profile.lora in ids:
            by_lora.setdefault(profile.lora, {})[profile.half] = profile
    tasks = []
    for own in by_lora.values():
        paths = {half: Path(profile.path) for half, profile in own.items()}
        one = next(iter(own.values()))
        lora: Files = Path(one.path)
        options = ReadOptions(**one.options)
        if None not in own:
            lora = Halves(paths.get(HIGH, Path(one.path)), paths.get(LOW, Path(one.path)))
            options = replace(options, denoiser=None)
        tasks.append(Task(lora, options, device, store.folder, partners, counts))
    return tasks


def _run(
    tasks: Collection[Task], store: Store, engine: Engine | None, on_lora: OnLora | None
) -> Iterator[Result]:
    """Run tasks, keep each result as it comes, and yield it without its numbers."""
    for done, result in enumerate(results(engine, profiled, tasks), start=1):
        keep(store, result)
        if on_lora is not None:
            on_lora(result, done, len(tasks))
        yield replace(result, statistics=())


def run_tasks(
    tasks: Collection[Task], store: Store, engine: Engine | None, on_lora: OnLora | None = None
) -> list[Result]:
    """Run tasks and keep their results; see :func:`gather`."""
    return list(_run(tasks, store, engine, on_lora))
