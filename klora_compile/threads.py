"""How many threads a computation has, in the one place that sets it.

A library that splits one sum or product among threads may round differently for another number of
threads. What goes into an artifact or a statistic must not, so it is computed by one thread:

* :func:`single_thread` for work that comes one piece after the other,
* :func:`single_threads` for many pieces that are independent: the threads share out the pieces.

Work whose last bits do not matter takes neither. Both are settings of the process; so is
:func:`klora_runtime.devices.precision.full_float32`, which goes around whatever multiplies float32
matrices for keeps. ``torch.inference_mode`` and ``torch.no_grad`` are each thread's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread for torch's CPU operations inside, and no autograd."""
    with _told(1), torch.no_grad():
        yield


@contextmanager
def single_threads(name: str, *, most: int) -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch has, which torch and the BLAS behind it do not split any further.

    Args:
        name: that theirs begin with.
        most: threads, whatever torch has.
    """
    with _told(1) as before:
        pool = ThreadPoolExecutor(
            min(before, most),
            thread_name_prefix=name,
            initializer=torch.set_num_threads,  # the BLAS' setting is a thread's own
            initargs=(1,),
        )
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _told(threads: int) -> Iterator[int]:
    """Tell torch how many threads it has; gives how many it had, and gives them back."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield before
    finally:
        torch.set_num_threads(before)
