"""``klora tune``: the command, without a browser."""

from __future__ import annotations

import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from support.shipped import Shipped, error_of, klora


def tuned(shipped: Shipped, *options: object) -> Any:
    folder = shipped.artifact.parent
    pair = folder / "fox.safetensors", folder / "ink.safetensors"
    return klora("tune", *pair, "--model", shipped.model, "--device", "cpu", *options)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Address and text of the pages that were served; each ends after one look at it."""
    gradio = pytest.importorskip("gradio", reason="Gradio is not installed (extra tune)")
    found: list[tuple[str, str]] = []

    def look(self: Any) -> None:
        with urllib.request.urlopen(self.local_url, timeout=60) as answer:
            found.append((self.local_url, answer.read().decode()))

    monkeypatch.setattr(gradio.Blocks, "block_thread", look)
    return found


def test_it_serves_a_page_to_this_machine_alone(
    shipped: Shipped, read: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    monkeypatch.setenv("GRADIO_SHARE", "True")
    result = tuned(shipped, "--set", "steps=2", "--set", "weight.style=0.5", "--no-cache")
    assert result.exit_code == 0, result.output
    ((address, text),) = read
    assert address.startswith("http://127.0.0.1:")
    assert f"klora tune is at {address} until Ctrl-C" in result.output
    assert "klora tune: fox × ink" in text or "klora tune: fox \\u00d7 ink" in text


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--set", "bias=7"), "bias: expected a number from -1 to 1, found 7"),
        (("--set", "bais=0"), "bais: there is no such setting; expected rule, "),
        (("--set", "weight.sytle=1"), "weights: expected content or style, found 'sytle'."),
        (("--port", "1", "--host", "192.0.2.1"), "no page can be served at 192.0.2.1:1."),
    ],
)
def test_what_is_wrong_is_said_before_the_page(
    options: tuple[str, ...], error: str, shipped: Shipped, read: list[tuple[str, str]]
) -> None:
    result = tuned(shipped, *options)
    assert result.exit_code in (1, 2)
    assert error in error_of(result, result.exit_code)
    assert read == []


def test_without_gradio_it_says_how_to_install_it(
    shipped: Shipped, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.startswith("klora_compile.tuning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    message = error_of(tuned(shipped), 1)
    assert message == (
        "klora tune needs gradio, which is not installed. Run this in klora's source folder: "
        "pip install ./runtime '.[tune]'"
    )


def test_gradio_is_imported_by_the_page_s_own_files_alone() -> None:
    folder = Path(__file__).parents[2] / "klora_compile"
    found = {p.name for p in folder.rglob("*.py") if "import gradio" in p.read_text()}
    assert found == {"layout.py", "events.py", "page.py"}
