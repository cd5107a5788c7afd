"""Compression: the fewest bytes that keep every delta within a tolerance.

`components` distributes the bits, `step_search` finds each slot's step, and `trellis` chooses the
whole numbers to store. Many layers are compressed together, because the numbers of a row are chosen
one after another, for all rows of one length at once.

Everything runs on one thread, because the bits of decompositions depend on the number of threads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from klora_compile.storing.step_search import StepSearch
from klora_compile.storing.tolerances import BY, HIGHEST, LOWEST, By, tolerances
from klora_compile.storing.trellis import Trellis
from klora_compile.threads import single_thread
from klora_runtime.artifact.delta import Stored
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.devices.names import HOST
from klora_runtime.errors import ConfigError

#: Numbers in the factors of layers that are compressed together (at least one layer).
_TOGETHER = 2**23

#: Called after each layer with its name, the number of finished layers, and the total.
OnLayer = Callable[[str, int, int], None]


#: An entry with the tolerance of each of its slots.
_Wanted = tuple[Entry, Mapping[str, float]]


def compress(
    fusion: Fusion, tolerance: float, *, by: By = "layer", on_layer: OnLayer | None = None
) -> Fusion:
    """Compress a fusion.

    Args:
        fusion: a compiled fusion; its schedule and scores do not change.
        tolerance: greatest relative Frobenius error, 1e-5 to 0.5. Deltas that do not become smaller
            within it stay unchanged.
        by: what the tolerance holds for: ``layer``, the delta of each slot of each layer; ``lora``,
            all deltas of a slot in one component together, of which each number then loses the
            same, and none more than half of its delta. That takes fewer bytes for an equal loss.
        on_layer: called after each layer.

    Returns:
        The compressed fusion; its factors have the values that will be read from the file.

    Raises:
        ConfigError: the tolerance is out of range, ``by`` is unknown, or the fusion is already
            compressed or thin.
    """
    if not LOWEST <= tolerance <= HIGHEST:
        raise ConfigError(
            f"tolerance: expected a number from {LOWEST:g} to {HIGHEST:g}, found {tolerance!r}."
        )
    if by not in BY:
        raise ConfigError(f"by: expected {' or '.join(BY)}, found {by!r}.")
    stored = [each for entry in fusion.entries for each in entry.factors.values()]
    if fusion.is_thin or any(each.quantised is not None for each in stored):
        raise ConfigError(
            "this fusion is compressed or thin already, and only a lossless one can be "
            "compressed. Compile its sources again."
        )
    small = list[Entry]()
    trellis = Trellis()
    with single_thread():
        shares = tolerances(fusion.entries, tolerance, by)
        for wanted in _batches(list(zip(fusion.entries, shares, strict=True))):
            for entry in _smallest(wanted, trellis):
                small.append(entry)
                if on_layer is not None:
                    on_layer(entry.layer, len(small), len(fusion.entries))
    return replace(fusion, entries=tuple(small))


def _batches(wanted: Sequence[_Wanted]) -> Iterator[list[_Wanted]]:
    """Yield batches of entries that are compressed together."""
    batch, numbers = list[_Wanted](), 0
    for entry, shares in wanted:
        deltas = [stored.delta for stored in entry.factors.values()]
        own = sum(tensor.numel() for delta in deltas for tensor in delta.tensors)
        if batch and numbers + own > _TOGETHER:
            yield batch
            batch, numbers = [], 0
        batch.append((entry, shares))
        numbers += own
    if batch:
        yield batch


def _smallest(wanted: Sequence[_Wanted], trellis: Trellis) -> Iterator[Entry]:
    """Yield the entries with compressed factors, or unchanged ones if those are smaller."""
    searches = [
        {slot: StepSearch(each, entry.shape, shares[slot]) for slot, each in _here(entry).items()}
        for entry, shares in wanted
    ]
    _settle([search for slots in searches for search in slots.values()], trellis)
    for (entry, _), slots in zip(wanted, searches, strict=True):
        results: dict[str, Stored] = {slot: own.result for slot, own in slots.items()}
        yield replace(entry, factors=results)


def _here(entry: Entry) -> dict[str, Stored]:
    """Return the factors of an entry in host memory."""
    return {
        slot: stored
        if all(tensor.device == HOST for tensor in stored.delta.tensors)
        else replace(stored, delta=stored.delta.to(HOST))
        for slot, stored in entry.factors.items()
    }


def _settle(searches: Sequence[StepSearch], trellis: Trellis) -> None:
    """Run all searches to the end; each round handles all rows of one length at once."""
    while wanted := [(search, targets) for search in searches if (targets := search.targets)]:
        alike: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        for _, targets in wanted:
            for target in targets:
                alike[target[0].shape[1]].append(target)
        chosen = {}
        for length, group in alike.items():
            rows = torch.cat([own for own, _ in group])
            points = trellis.nearest(rows, torch.cat([large for _, large in group]))
            chosen[length] = iter(torch.split(points, [len(own) for own, _ in group]))
        for search, targets in wanted:
            search.settle([next(chosen[rows.shape[1]]) for rows, _ in targets])
