"""Fixtures of the tests of klora's nodes for ComfyUI."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from support.comfyui.kits import Double, kit_named, kits, pack


@pytest.fixture(params=kits())
def kit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Double:
    """ComfyUI's double, and ComfyUI itself where it is named; the pack imports what this is."""
    found = kit_named(request.param)
    for name, module in found.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


@pytest.fixture(scope="session")
def acting() -> Any:
    return pack("acting")


@pytest.fixture(scope="session")
def clock(acting: Any) -> Any:
    return sys.modules[f"{acting.__package__}.clock"]


@pytest.fixture
def logs() -> Iterator[list[str]]:
    """The messages that the nodes log during the test."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("klora")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)
