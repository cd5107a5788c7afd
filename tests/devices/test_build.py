"""What torch was built for, told without torch."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from klora_compile.measuring.places import place_of
from klora_runtime.devices import build
from klora_runtime.devices.build import has_no_gpus

LINES = {
    "cpu": "__version__ = '2'\ncuda: Optional[str] = None\nhip = None\nxpu: Optional[str] = None\n",
    "cuda": "cuda: Optional[str] = '12.8'\nhip = None\nxpu = None\n",
    "rocm": "cuda = None\nhip: Optional[str] = '6.4'\nxpu = None\n",
    "xpu": "cuda = None\nhip = None\nxpu = '2025'\n",
    "other": "number = 3\n",
    "broken": "cuda = (\n",
}


@pytest.mark.parametrize("kind", LINES)
def test_only_a_build_for_cpus_alone_is_one(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text(LINES[kind])
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(build, "find_spec", lambda name: spec)
    monkeypatch.setattr(sys, "platform", "linux")
    assert has_no_gpus() is (kind == "cpu")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not has_no_gpus()


def test_a_torch_that_cannot_be_found_has_to_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    assert not has_no_gpus()


def test_this_torch_agrees() -> None:
    if has_no_gpus():
        assert not torch.cuda.is_available()
        assert place_of("auto") == "cpu"
    assert place_of("cpu") == "cpu"
