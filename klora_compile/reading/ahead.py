"""Numbers of LoRAs that are read while others are measured.

Only layers that lie in their file as they are come this way: their headers tell everything else,
and copying rounds nothing, whatever runs beside it. What is read is kept, as an artifact may need
it; so reading ahead fills no more memory than reading beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event, Lock
from types import TracebackType
from typing import Any, TypeVar

from klora_compile.reading.adapter import Adapter, OpenAdapter, file_errors
from klora_compile.reading.arriving import ArrivingLayers
from klora_compile.reading.describing import Piece
from klora_compile.reading.evaluating import outlines

_T = TypeVar("_T")


class ReadAhead:
    """Reads files one after the other, each in the order of its layers. A context manager, to be
    used inside those of the files.

    Nothing is read before a layer or a digest is asked for. Then one thread reads the layers and
    one takes the digests, until all is there, something is wrong, or the context ends.
    """

    def __init__(self) -> None:
        self._layers: list[tuple[OpenAdapter, ArrivingLayers]] = []
        self._digests: list[tuple[OpenAdapter, Future[str]]] = []
        self._error: Exception | None = None
        self._lock, self._begun, self._stop = Lock(), False, Event()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="klora-read")

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._pool.shutdown()

    def adapter(self, opened: OpenAdapter) -> Adapter:
        """An adapter whose numbers are on their way.

        Args:
            opened: one that lies as it is.
        """
        every = (layer for piece in opened.survey.pieces for layer in outlines(piece, opened.file))
        layers, digest = ArrivingLayers(every, self.wait, self.check), Future[str]()
        self._layers.append((opened, layers))
        self._digests.append((opened, digest))
        return opened.adapter(layers, lambda: self.wait(digest))

    def wait(self, promised: Future[_T]) -> _T:
        """What was promised.

        Raises:
            LoraError: something is wrong with one of the files.
        """
        with self._lock:
            begun, self._begun = self._begun, True
        if not begun:
            promises = [each for _, layers in self._layers for each in layers.coming.values()]
            self._pool.submit(self._keep, self._read_layers, promises)
            self._pool.submit(self._keep, self._take_digests, [each for _, each in self._digests])
        return promised.result()

    def check(self) -> None:
        """Raise what went wrong, if anything did."""
        if self._error is not None:
            raise self._error

    def _keep(self, work: Callable[[], None], promises: list[Future[Any]]) -> None:
        """Work until all promises are kept; those that cannot be are broken, not forgotten."""
        try:
            with file_errors():
                work()
        except Exception as error:
            self._error = error
            for each in promises:
                if not each.done():
                    each.set_exception(error)
        for each in promises:
            each.cancel()  # if it is open still

    def _read_layers(self) -> None:
        for opened, layers in self._layers:
            for _, some in opened.evaluated(sorted(opened.survey.pieces, key=_first_layer)):
                for layer in some:
                    layers.coming[layer.name].set_result(layer)
                if self._stop.is_set():
                    return

    def _take_digests(self) -> None:
        for opened, digest in self._digests:
            if self._stop.is_set():
                return
            digest.set_result(opened.file.sha256)


def _first_layer(piece: Piece) -> str:
    return min(facts.name for facts in piece.layers)
