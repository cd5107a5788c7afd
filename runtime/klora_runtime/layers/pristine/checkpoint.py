"""Base values that are read back from the file that a model was loaded from.

A parameter is read back if a file has its bits: after the conversion to the dtype in which the
model was loaded, they equal the live ones. Everything else keeps its copy, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from klora_runtime.artifact.tensor_file import memory_of, torch_dtype
from klora_runtime.devices.names import HOST
from klora_runtime.errors import InUseError
from klora_runtime.layers.pristine.held_files import HeldFile, HeldFiles
from klora_runtime.layers.targets import Target


@dataclass(eq=False)
class Place:
    """Where the base value of one parameter is."""

    target: Target
    file: HeldFile
    name: str
    """Name of the tensor in the file."""
    dtypes: list[torch.dtype] = field(default_factory=list)
    """What the value was converted to since, in this order."""
    kept: torch.Tensor | None = None
    """A copy of the value, once the file was given up."""
    why: str = ""
    """Why the file was given up."""

    def copy(self) -> None:
        """See :meth:`Reader.copy`."""
        if self.kept is None:
            self.kept = self.read(torch.empty(self.nbytes, dtype=torch.uint8))
            self.why = "another program wanted to write to its file"

    def keep_live(self) -> None:
        """Copy the live value, which is the base's at this moment."""
        self.kept = self.target.origin.to(HOST, copy=True)
        self.dtypes = [self.kept.dtype]
        self.why = "its file changed while the fusion was off"

    def read(self, memory: torch.Tensor) -> torch.Tensor:
        """Return the value in the file, in this memory of bytes; it may be larger."""
        info = self.file.tensors[self.name]
        own = memory[: info.nbytes]
        self.file.read_into(memory_of(own), self.name)
        return own.view(torch_dtype(info.dtype)).view(info.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the value in the file."""
        return self.file.tensors[self.name].nbytes

    def follow(self) -> None:
        """Note that the parameter was converted."""
        dtype = self.target.origin.dtype
        if self.dtypes[-1] != dtype:
            self.dtypes.append(dtype)

    def converted(self, value: torch.Tensor) -> torch.Tensor:
        """Return a value of the file as the parameter has it now, in its shape."""
        for dtype in self.dtypes:
            value = value.to(dtype)
        return value.view(self.target.origin.shape)


class Checkpoint:
    """The base values that files have, by the path of the target.

    Args:
        targets: targets whose parameters hold base values now, unless ``previous`` has their place.
        previous: the checkpoint of an earlier set of targets of the same model.

    Attributes:
        refused: path of a target whose host names files -> why it is not read back.
    """

    def __init__(self, targets: Sequence[Target], previous: Checkpoint | None = None) -> None:
        known = {} if previous is None else previous._places
        before = {} if previous is None else previous.refused
        self._files: HeldFiles = HeldFiles() if previous is None else previous._files
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._places: dict[str, Place] = {}
        self.refused: dict[str, str] = {}
        for target in targets:
            if target.path in before:
                self.refused[target.path] = before[target.path]
                continue
            found = known.get(target.path) or self._find(target)
            if isinstance(found, Place):
                self._places[target.path] = found
                self._files.add(found)
            elif found is not None:
                self.refused[target.path] = found

    def __contains__(self, path: str) -> bool:
        return path in self._places

    def of(self, target: Target) -> torch.Tensor:
        """Return a base value, valid until the next one is asked for; do not write into it.

        Raises:
            InUseError: the file was changed; nothing else can tell the value.
        """
        place = self._places[target.path]
        with self._files.lock:
            place.follow()
            if self._files.resting:
                return target.origin
            if place.kept is not None:
                return place.converted(place.kept)
            return place.converted(place.read(self._room(place.nbytes)))

    def was_converted(self, target: Target) -> bool:
        """Return whether a target's parameter has another dtype than at the last look."""
        return self._places[target.path].dtypes[-1] != target.origin.dtype

    def check(self) -> None:
        """Compare the files with what they were; copy what is in those that others wait for.

        Raises:
            InUseError: a file was changed.
        """
        self._files.check()

    def rest(self) -> None:
        """All parameters hold base values now: let the files change."""
        self._files.rest()

    def resume(self) -> None:
        """Parameters are about to change: hold the files again, or copy what cannot be held."""
        if self._files.resting:
            for place in self._files.resume():
                assert isinstance(place, Place)
                if place.kept is None:
                    place.keep_live()

    def forget(self) -> None:
        """Close all files."""
        self._files.close()
        self._places.clear()
        self._scratch = self._scratch.new_empty(0)

    def kept(self) -> Iterator[torch.Tensor]:
        """Yield the copies of what files had."""
        return (place.kept for place in self._places.values() if place.kept is not None)

    def copied(self) -> dict[str, str]:
        """Return path of a target that has a copy -> why."""
        places = self._places.items()
        return self.refused | {path: each.why for path, each in places if each.kept is not None}

    @property
    def scratch_nbytes(self) -> int:
        """Bytes of the memory into which values are read."""
        return self._scratch.nbytes

    def _room(self, nbytes: int) -> torch.Tensor:
        if self._scratch.numel() < nbytes:
            self._scratch = torch.empty(nbytes, dtype=torch.uint8)
        return self._scratch

    def _find(self, target: Target) -> Place | str | None:
        """Return the place of a target's base value, or why there is none; None if none is named.

        What a fusion may have changed already cannot be compared, so it is not read back.
        """
        files = target.host.checkpoints(target.entry.component, target.model)
        if files is None:
            return None
        why = "no safetensors file of the checkpoint has it under this name"
        for path in files:
            file = self._files.open(path)
            if isinstance(file, str):
                why = file
                continue
            for name in _names(target):
                info = file.tensors.get(name)
                if info is None:
                    continue
                place = Place(target, file, name, [target.origin.dtype])
                if self._is_equal(place):
                    return place
                why = "it differs from the checkpoint"
        return why

    def _is_equal(self, place: Place) -> bool:
        """Return whether a file has a parameter's bits; as a number, NaN differs from itself."""
        info, live = place.file.tensors[place.name], place.target.origin
        if info.shape != tuple(live.shape) or info.nbytes == 0:
            return False
        try:
            with self._files.lock, torch.inference_mode():
                found = place.converted(place.read(self._room(place.nbytes)))
                here = live.to(HOST).contiguous()
                return torch.equal(_as_bits(found), _as_bits(here))
        except InUseError:  # it changes right now
            return False


def _as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes as whole numbers, the larger the faster to compare."""
    flat = tensor.reshape(-1)
    return flat.view(torch.uint8 if flat.nbytes % 8 else torch.int64)


def promised(targets: Iterable[Target]) -> set[str]:
    """Return the paths of targets whose host names a checkpoint; most of them need no copy."""
    return {
        target.path
        for target in targets
        if target.host.checkpoints(target.entry.component, target.model)
    }


def _names(target: Target) -> Iterator[str]:
    """Yield the names that a parameter may have in a file of its component."""
    parameter = target.entry.parameter
    module = ".".join(target.names)
    for path in dict.fromkeys((module, *target.host.paths(module))):
        yield f"{path}.{parameter}" if path else parameter
