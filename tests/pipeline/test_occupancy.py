"""One loop at a time, told apart by threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from klora_runtime.errors import InUseError
from klora_runtime.pipeline.occupancy import Occupancy


def in_a_thread(act: Callable[[], None]) -> int | None:
    """Run ``act`` to its end in a thread, and give the number that the thread had."""
    thread = threading.Thread(target=act)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return thread.ident


def test_a_new_thread_with_the_number_of_a_dead_one_is_another() -> None:
    """Systems give the numbers of ended threads to the next ones."""
    occupancy = Occupancy()
    abandoned = in_a_thread(occupancy.begin)

    def go_on() -> None:
        with pytest.raises(InUseError, match="generating in another thread") as error:
            occupancy.go_on()
        refused.append(error.value)

    refused: list[BaseException] = []
    numbers = [in_a_thread(go_on) for _ in range(20)]

    assert len(refused) == 20, f"{abandoned} begun, refused {numbers}"


def test_what_a_dead_thread_abandoned_keeps_nobody_from_changing() -> None:
    occupancy = Occupancy()
    in_a_thread(occupancy.begin)
    with occupancy.change():
        pass
    assert not occupancy.going_on


def test_what_a_living_thread_abandoned_keeps_others_from_changing() -> None:
    occupancy, begun, end = Occupancy(), threading.Event(), threading.Event()

    def begin() -> None:
        occupancy.begin()
        begun.set()
        end.wait(60)

    thread = threading.Thread(target=begin)
    thread.start()
    assert begun.wait(60)
    with (
        pytest.raises(InUseError, match="set_timesteps in this thread to end it"),
        occupancy.change(),
    ):
        pass
    end.set()
    thread.join(60)
    with occupancy.change():
        pass
