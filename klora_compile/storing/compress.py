"""Compression: the fewest bytes whose deltas stay within a tolerance.

`components` says how many bits are worth spending where, `step_search` finds each slot's step, and
`trellis` the whole numbers that are stored. Many layers are done together, because numbers are
chosen one after the other along a row, for all rows of one length at once.

All of it is computed on one thread: decompositions differ in bits with the number of threads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from klora_compile.storing.step_search import StepSearch
from klora_compile.storing.trellis import nearest
from klora_compile.threads import single_thread
from klora_runtime.artifact.delta import Stored
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.devices.names import HOST
from klora_runtime.errors import ConfigError

#: What may be lost of a delta: relative Frobenius error.
LOWEST, HIGHEST = 1e-5, 0.5

#: Numbers of the factors of layers that are done together, unless one layer has more.
_TOGETHER = 2**23

#: Called after each layer with its name, how many are done and how many there are.
OnLayer = Callable[[str, int, int], None]


def compress(fusion: Fusion, tolerance: float, *, on_layer: OnLayer | None = None) -> Fusion:
    """Store a fusion in fewer bytes.

    Args:
        fusion: as compiled; its schedule and scores stay what they are.
        tolerance: relative Frobenius error that the delta of each slot of each layer may have,
            1e-5 to 0.5. What cannot be made smaller within it stays as it is.
        on_layer: called after each layer.

    Returns:
        The fusion as it will be read again: its factors are what their few bits stand for.

    Raises:
        ConfigError: the tolerance is out of range, or the fusion is compressed or thin already.
    """
    if not LOWEST <= tolerance <= HIGHEST:
        raise ConfigError(
            f"tolerance: expected a number from {LOWEST:g} to {HIGHEST:g}, found {tolerance!r}."
        )
    stored = [each for entry in fusion.entries for each in entry.factors.values()]
    if fusion.is_thin or any(each.quantised is not None for each in stored):
        raise ConfigError(
            "this fusion is compressed or thin already, and only a lossless one can be "
            "compressed. Compile its sources again."
        )
    small = list[Entry]()
    with single_thread():
        for entries in _batches(fusion.entries):
            for entry in _smallest(entries, tolerance):
                small.append(entry)
                if on_layer is not None:
                    on_layer(entry.layer, len(small), len(fusion.entries))
    return replace(fusion, entries=tuple(small))


def _batches(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """As many entries as are done together."""
    batch, numbers = list[Entry](), 0
    for entry in entries:
        deltas = [stored.delta for stored in entry.factors.values()]
        own = sum(tensor.numel() for delta in deltas for tensor in delta.tensors)
        if batch and numbers + own > _TOGETHER:
            yield batch
            batch, numbers = [], 0
        batch.append(entry)
        numbers += own
    if batch:
        yield batch


def _smallest(entries: Sequence[Entry], tolerance: float) -> Iterator[Entry]:
    """The entries with their factors in the fewest bytes, or as they are where that is fewest."""
    searches = [
        {slot: StepSearch(each, entry.shape, tolerance) for slot, each in _here(entry).items()}
        for entry in entries
    ]
    _settle([search for slots in searches for search in slots.values()])
    for entry, slots in zip(entries, searches, strict=True):
        results: dict[str, Stored] = {slot: own.result for slot, own in slots.items()}
        yield replace(entry, factors=results)


def _here(entry: Entry) -> dict[str, Stored]:
    """Return the factors of an entry in host memory, wherever the fusion is kept."""
    return {
        slot: stored
        if all(tensor.device == HOST for tensor in stored.delta.tensors)
        else replace(stored, delta=stored.delta.to(HOST))
        for slot, stored in entry.factors.items()
    }


def _settle(searches: Sequence[StepSearch]) -> None:
    """Run all searches to their ends; in each round all rows of one length are done at once."""
    while wanted := [(search, targets) for search in searches if (targets := search.targets)]:
        alike: dict[int, list[torch.Tensor]] = defaultdict(list)
        for _, targets in wanted:
            for rows in targets:
                alike[rows.shape[1]].append(rows)
        chosen = {
            length: iter(torch.split(nearest(torch.cat(group)), [len(rows) for rows in group]))
            for length, group in alike.items()
        }
        for search, targets in wanted:
            search.settle([next(chosen[rows.shape[1]]) for rows in targets])
