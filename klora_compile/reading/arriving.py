"""Layers of a LoRA that is being read: all is known of them but their numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future

from klora_compile.reading.layers import Layer


class ArrivingLayers(Mapping[str, Layer]):
    """Layer name -> layer, sorted by name. A layer that is asked for is waited for.

    Args:
        outlines: the layers as the header tells them, their tensors on torch's device ``meta``.
        wait: waits for a layer.
        check: raises what went wrong where layers are read, these or others.
    """

    def __init__(
        self,
        outlines: Iterable[Layer],
        wait: Callable[[Future[Layer]], Layer],
        check: Callable[[], None],
    ) -> None:
        self.outlines = {each.name: each for each in sorted(outlines, key=lambda each: each.name)}
        self.coming: dict[str, Future[Layer]] = {name: Future() for name in self.outlines}
        self.check = check
        self._wait = wait

    def __getitem__(self, name: str) -> Layer:
        return self._wait(self.coming[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.outlines)

    def __len__(self) -> int:
        return len(self.outlines)


def known(layers: Mapping[str, Layer]) -> Mapping[str, Layer]:
    """Layers, or their outlines while they arrive: nothing is waited for."""
    return layers.outlines if isinstance(layers, ArrivingLayers) else layers


def check(layers: Mapping[str, Layer]) -> None:
    """Raise what went wrong already while these layers arrive, or others with them."""
    if isinstance(layers, ArrivingLayers):
        layers.check()
