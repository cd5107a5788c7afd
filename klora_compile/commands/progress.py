"""Progress bars on stderr while layers or LoRAs are measured, or a base model calibrates.

They are silent without a terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def layer_bar(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Give a tqdm bar as the ``on_layer`` callback of a measurement."""
    if not sys.stderr.isatty():
        yield lambda name, done, total: None
        return
    from tqdm import tqdm  # it takes as long to import as a short command takes

    with tqdm(desc=what, unit="layer", leave=False) as bar:

        def on_layer(name: str, done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield on_layer


@contextmanager
def part_bar(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Give a tqdm bar of a calibration, which says what was done last and the time that is left."""
    if not sys.stderr.isatty():
        yield lambda name, done, total: None
        return
    from tqdm import tqdm

    with tqdm(desc=what, leave=False) as bar:

        def on_part(name: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_postfix_str(name, refresh=False)
            bar.update(done - bar.n)

        yield on_part


@contextmanager
def picture_bar() -> Iterator[Callable[[str, int], None]]:
    """Give a tqdm bar, with the time left, that is told each picture and how many remain."""
    if not sys.stderr.isatty():
        yield lambda name, left: None
        return
    from tqdm import tqdm

    with tqdm(desc="sampling", unit="picture") as bar:

        def on_picture(name: str, left: int) -> None:
            if bar.total is None:
                bar.total = left
            bar.set_postfix_str(name, refresh=False)
            bar.update(bar.total - left - bar.n)

        yield on_picture
        bar.update((bar.total or 0) - bar.n)


@contextmanager
def lora_bar(what: str) -> Iterator[Callable[[object, int, int], None]]:
    """Give a tqdm bar that counts LoRAs or pairs."""
    if not sys.stderr.isatty():
        yield lambda each, done, total: None
        return
    from tqdm import tqdm

    with tqdm(desc=what, leave=False) as bar:

        def on_each(each: object, done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield on_each
