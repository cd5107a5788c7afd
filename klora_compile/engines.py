"""Engines: where many independent pieces of work run, behind the form of Python's executors.

An engine is anything with the form of ``concurrent.futures.Executor``: a pool of processes by
default, Ray by name, or what a program passes, such as ``dask.distributed``'s ``get_executor()``.
Results do not depend on the engine, on the number of workers, or on their order.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    as_completed,
)
from typing import Any, TypeVar

from klora_compile.extras import missing_library
from klora_runtime.errors import ConfigError, KloraError

T = TypeVar("T")
R = TypeVar("R")

#: Names on the command line; Ray may have an address behind a colon.
PROCESSES, RAY = "processes", "ray"

#: How often a pool that lost a worker is replaced.
_POOLS = 3

#: How often Ray starts a task again whose worker died.
_TRIES = 3

#: Makes an executor.
Engine = Callable[[], Executor]


def engine_of(name: str, workers: int, *, gpus: bool = False) -> Engine | None:
    """Return the engine of a name; None for this process itself.

    Args:
        name: ``processes``, ``ray`` for a Ray of this machine, or ``ray:ADDRESS`` for a cluster.
        workers: number of workers; of ``processes``, one is this process itself.
        gpus: whether each worker needs a GPU of its own, which Ray hands out.

    Raises:
        ConfigError: there is no such engine.
        KloraError: Ray is not installed.
    """
    kind, _, address = name.partition(":")
    if kind == RAY:
        _refuse_missing_ray()
        return lambda: RayExecutor(address or None, workers, gpus=gpus)
    if name != PROCESSES:
        raise ConfigError(f"engine: expected {PROCESSES}, ray or ray:ADDRESS, found {name!r}.")
    return None if workers == 1 else lambda: _pool(workers)


def results(engine: Engine | None, work: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
    """Yield the result of each task, in the order in which they come.

    Tasks whose worker died are given to a new pool.

    Args:
        engine: makes the executor; None to work in this process.
        work: a function at the top of a module.
        tasks: what to give it, one by one; task and result can be pickled.

    Raises:
        KloraError: workers keep dying.
    """
    if engine is None:
        yield from map(work, tasks)
        return
    left = dict(enumerate(tasks))
    for _ in range(_POOLS):
        if not left:
            return
        with engine() as executor:
            running = {executor.submit(work, task): number for number, task in left.items()}
            try:
                for future in as_completed(running):
                    result = future.result()
                    del left[running[future]]
                    yield result
            except BrokenExecutor:
                continue
            finally:
                for future in running:
                    future.cancel()
    if left:
        raise KloraError(
            f"workers died {_POOLS} times, and {len(left)} pieces of work are left. They may lack "
            "memory: take fewer --workers. What is done is kept; run the command again."
        )


class RayExecutor(Executor):
    """Ray in the form of an executor; Ray itself distributes, and starts tasks again.

    Args:
        address: of a cluster; None for a Ray of this machine.
        workers: number of CPUs of a Ray of this machine.
        gpus: whether each task needs a GPU.
    """

    def __init__(self, address: str | None, workers: int, *, gpus: bool = False) -> None:
        import ray

        self._ray = ray
        self._own = not ray.is_initialized()
        if self._own:
            local: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False}
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **({} if address else local),
            )
        self._settings = {"num_cpus": 1, "max_retries": _TRIES} | ({"num_gpus": 1} if gpus else {})

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Give Ray a piece of work; see :class:`concurrent.futures.Executor`."""
        remote = self._ray.remote(**self._settings)(fn)
        future: Future[Any] = remote.remote(*args, **kwargs).future()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave Ray, if this object started it."""
        if self._own:
            self._ray.shutdown()
            self._own = False


def _refuse_missing_ray() -> None:
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise missing_library("--engine ray", error) from error


def _pool(workers: int) -> Executor:
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),  # torch's threads do not survive a fork
        initializer=_share_cores,
        initargs=(workers,),
    )


def _share_cores(workers: int) -> None:
    """Give each worker its part of the cores."""
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
