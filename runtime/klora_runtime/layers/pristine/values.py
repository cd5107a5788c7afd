"""The base values of targets' parameters, whatever their source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from klora_runtime.devices.names import HOST
from klora_runtime.layers.pristine.checkpoint import Checkpoint, promised
from klora_runtime.layers.pristine.copies import Copies, host_shortage
from klora_runtime.layers.targets import Target


class Pristine:
    """The base values of targets' parameters, by the target's path.

    Args:
        targets: targets whose values to keep. Their parameters hold base values now, unless
            ``previous`` has them.
        previous: earlier base values; those of these targets are reused.
    """

    def __init__(self, targets: Sequence[Target], previous: Pristine | None = None) -> None:
        before = (None, None) if previous is None else (previous._checkpoint, previous._copies)
        self._targets = {target.path: target for target in targets}
        self._checkpoint: Checkpoint = Checkpoint(targets, before[0])
        self._copies: Copies = Copies(
            [target for target in targets if target.path not in self._checkpoint], before[1]
        )

    def of(self, target: Target) -> torch.Tensor:
        """Return the base value of a target, in its parameter's present dtype.

        It equals the bare model's value, also where the parameter was moved or converted since. It
        is valid until the next value is asked for, except where :meth:`keeps` it.

        Raises:
            InUseError: the value was in a file that was changed.
        """
        return self._source(target).of(target)

    def keeps(self, target: Target) -> bool:
        """Return whether a copy of a target's value lies in memory and stays there."""
        return target.path in self._copies

    def is_kept_on(self, target: Target, device: torch.device) -> bool:
        """Return whether a copy of a target's value stays on a device."""
        return self.keeps(target) and self._copies.of(target).device == device

    def was_converted(self, target: Target) -> bool:
        """Return whether a target's parameter has another dtype than its base value had."""
        return self._source(target).was_converted(target)

    def check(self) -> None:
        """Check that every base value can still be had.

        Raises:
            InUseError: a file was changed; nothing was written.
        """
        self._checkpoint.check()

    def resume(self) -> None:
        """Parameters are about to change; see :meth:`Checkpoint.resume`."""
        self._checkpoint.resume()

    def rest(self) -> None:
        """All parameters hold their base values now; see :meth:`Checkpoint.rest`."""
        self._checkpoint.rest()

    def restore(self, paths: Iterable[str]) -> None:
        """Write the base values of these targets back to the bit."""
        targets = [self._targets[path] for path in paths]
        kept = [target for target in targets if self.keeps(target)]
        with torch.inference_mode():
            if kept:
                copies = [self._copies.of(target) for target in kept]
                torch._foreach_copy_([target.origin for target in kept], copies)
            for target in targets:
                if not self.keeps(target):
                    target.origin.copy_(self._checkpoint.of(target))
                target.publish()

    def forget(self) -> None:
        """Drop all base values."""
        self._copies.forget()
        self._checkpoint.forget()
        self._targets.clear()

    def copied(self) -> Mapping[str, str]:
        """Return path of a target that has a copy, although a checkpoint was named -> why."""
        return self._checkpoint.copied()

    def nbytes_by_place(self) -> dict[str, int]:
        """Return device name, such as ``cpu`` or ``cuda:0`` -> bytes of copies."""
        places = self._copies.nbytes_by_place()
        kept = sum(copy.nbytes for copy in self._checkpoint.kept())
        return places | {str(HOST): places.get(str(HOST), 0) + kept} if kept else places

    @property
    def scratch_nbytes(self) -> int:
        """Bytes of host memory into which values of a checkpoint are read."""
        return self._checkpoint.scratch_nbytes

    def _source(self, target: Target) -> Checkpoint | Copies:
        return self._copies if self.keeps(target) else self._checkpoint


def shortage(targets: Sequence[Target]) -> str | None:
    """Return why memory does not suffice for the copies that the targets need; None if it does."""
    read_back = promised(targets)
    return host_shortage([target for target in targets if target.path not in read_back])
