"""A bar on stderr while layers are measured; silent where stderr is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def layer_bar(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A tqdm bar as the ``on_layer`` of a measurement."""
    with tqdm(desc=what, unit="layer", disable=None, leave=False) as bar:

        def on_layer(name: str, done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield on_layer
