"""The number of threads of a computation; only this module sets it.

A library that splits a sum or product among threads may round differently with another number of
threads. Values for artifacts and statistics must not, so one thread computes each of them:

* :func:`single_thread` is for sequential work,
* :func:`single_threads` is for many independent pieces, which the threads share out.

Work whose last bits do not matter needs neither. Both change settings of the process; so does
:func:`klora_runtime.devices.precision.full_float32`, which belongs around products of float32
matrices whose result is kept. ``torch.inference_mode`` and ``torch.no_grad`` are per thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from klora_runtime.lazy_torch import torch


@contextmanager
def single_thread() -> Iterator[None]:
    """Run torch's CPU operations inside the block on one thread, without autograd."""
    with _told(1), torch.no_grad():
        yield


@contextmanager
def single_threads(name: str, *, most: int) -> Iterator[ThreadPoolExecutor]:
    """Give a pool of as many threads as torch has, each of which runs torch and BLAS serially.

    Args:
        name: prefix of the threads' names.
        most: greatest number of threads.
    """
    with _told(1) as before:
        pool = ThreadPoolExecutor(
            min(before, most),
            thread_name_prefix=name,
            initializer=torch.set_num_threads,  # BLAS keeps this setting per thread
            initargs=(1,),
        )
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _told(threads: int) -> Iterator[int]:
    """Set torch's number of threads inside the block; give the old number and restore it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield before
    finally:
        torch.set_num_threads(before)
