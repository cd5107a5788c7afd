"""Mode *branch*: the base weights stay untouched, and each layer adds its delta's output.

Parameters that no layer multiplies with (biases, norms, modulation tables) are small and are
written in place, as mode merge does. So are the few layers whose class does more around the
multiplication than torch's. So this mode has two parts: leaves that add (`leaves`), and a merge of
the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from heapq import merge as in_order

from torch import nn

from klora_runtime.layers.hindrances import branch_hindrances
from klora_runtime.layers.leaves import Leaves
from klora_runtime.layers.merge import Merge
from klora_runtime.layers.overflow import refuse_overflow
from klora_runtime.layers.rounding import Rounding
from klora_runtime.layers.targets import Target, refuse


class Branch:
    """Mode branch on a set of targets: adds sum of scale * coefficient * weight * delta.

    Args:
        targets: the layers to change.
        previous: the branch on the same model that this one replaces.

    Raises:
        IncompatibleModelError: a target cannot be branched; ``issues`` lists all of them.
    """

    name = "branch"

    def __init__(self, targets: Sequence[Target], previous: Branch | None = None) -> None:
        refuse(branch_hindrances(targets), "these layers cannot be branched; nothing was changed.")
        leaves = [target for target in targets if not target.is_written]
        written = [target for target in targets if target.is_written]
        before = (None, None) if previous is None else (previous._leaves, previous._rest)
        self._leaves: Leaves = Leaves(leaves, before[0])
        self._rest: Merge = Merge(written, before[1], whole=False)

    @property
    def paths(self) -> tuple[str, ...]:
        """See :attr:`Mode.paths`."""
        return tuple(in_order(self._leaves.paths, self._rest.paths))

    @property
    def switches(self) -> int:
        """See :attr:`Mode.switches`."""
        return self._leaves.switches + self._rest.switches

    @property
    def writes(self) -> bool:
        """See :attr:`Mode.writes`."""
        return bool(self._rest.paths)

    def check(self) -> None:
        """See :meth:`Mode.check`."""
        self._rest.check()
        self._leaves.check()

    def write(self, progress: float, weights: Mapping[str, float]) -> None:
        """See :meth:`Mode.write`."""
        self.check()
        refuse_overflow(self._leaves.overflows(weights))  # the rest checks itself
        self._rest.write(progress, weights)
        self._leaves.write(progress, weights)

    def move(self, progress: float, weights: Mapping[str, float]) -> None:
        """See :meth:`Mode.move`."""
        self._rest.move(progress, weights)
        self._leaves.move(progress, weights)

    def follow(self) -> bool:
        """See :meth:`Mode.follow`."""
        behind = [part.follow() for part in (self._rest, self._leaves)]  # each of them
        return any(behind)

    def overflows(self, weights: Mapping[str, float]) -> Iterator[str]:
        """See :meth:`Mode.overflows`."""
        yield from self._leaves.overflows(weights)
        yield from self._rest.overflows(weights)

    def confirm(self, model: nn.Module) -> None:
        """See :meth:`Mode.confirm`."""
        self._leaves.confirm(model)

    def pause(self) -> None:
        """See :meth:`Mode.pause`. Layers stay branched with gates of 0: nothing is recompiled."""
        self.check()
        self._rest.pause()
        self._leaves.pause()

    def successor(self, targets: Sequence[Target]) -> Branch:
        """See :meth:`Mode.successor`."""
        return Branch(targets, previous=self)

    def yield_to(self, other: Branch) -> None:
        """See :meth:`Mode.yield_to`."""
        self.check()
        self._rest.yield_to(other._rest)
        self._leaves.yield_to(other._leaves)

    def release(self) -> None:
        """See :meth:`Mode.release`."""
        self.check()
        self._rest.pause()  # if the rest is interrupted, the next move writes everything again
        self._leaves.release()
        self._rest.release()

    def rounding(self, weights: Mapping[str, float]) -> Iterator[Rounding]:
        """See :meth:`Mode.rounding`."""
        yield from self._leaves.rounding(weights)
        yield from self._rest.rounding(weights)

    def copied(self) -> Mapping[str, str]:
        """See :meth:`Mode.copied`."""
        return self._rest.copied()

    def nbytes(self) -> dict[str, int]:
        """See :meth:`Mode.nbytes`."""
        return dict(Counter(self._leaves.nbytes()) + Counter(self._rest.nbytes()))
