"""What the README shows is what the examples do."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import compare_rules
import demo
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from klora_compile.cli import main as klora

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_python_block_is_the_quickstart() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    quickstart = (ROOT / "examples" / "quickstart.py").read_text()
    body = quickstart.partition("# README: begin\n")[2].partition("# README: end")[0]
    assert block == body.replace("  # noqa: E402", "")


@pytest.mark.usefixtures("modules_cache")
def test_the_quickstart_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the script changes the folder; this changes it back
    monkeypatch.setattr(tempfile, "mkdtemp", lambda: str(tmp_path))
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
    assert "mode merge" in capsys.readouterr().out


@pytest.fixture
def threads() -> Iterator[None]:
    """As many threads as before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_a_demo_of_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, and so are its commands."""
    monkeypatch.setattr(demo, "STEPS", 2)
    monkeypatch.setattr(demo, "PAIRS", demo.PAIRS[:1])
    monkeypatch.setattr(demo, "klora", lambda *words: run_klora(*map(str, words)))
    result = CliRunner().invoke(demo.main, [str(tmp_path / "demo")])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Fuses 1 pairs of LoRAs by 3 rules, writes 3 artifacts, ")
    assert "after remove() the bare model's pictures are the same" in result.output
    assert_pictures(tmp_path / "demo")


@pytest.mark.usefixtures("threads")
def test_a_demo_whose_model_stays_changed_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shades = iter(range(256))
    monkeypatch.setattr(demo, "PAIRS", ())
    monkeypatch.setattr(demo, "base", lambda: None)
    monkeypatch.setattr(demo, "show", lambda *_: None)
    monkeypatch.setattr(demo, "draw", lambda *_: Image.new("L", (1, 1), next(shades)))
    result = CliRunner().invoke(demo.main, [str(tmp_path / "demo")])
    assert result.exit_code == 1
    assert "pictures are CHANGED" in result.output


def run_klora(*words: str) -> None:
    klora(list(words), standalone_mode=False)


def assert_pictures(folder: Path) -> None:
    few = f"pictures/{'-'.join(demo.PAIRS[0])}/4-steps/k-lora-s.png"
    for name in ("pictures.png", "schedule.png", few):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert len(list(folder.glob("*.klora.safetensors"))) >= 3


def test_the_demo_draws_at_most_sixty_pictures() -> None:
    assert demo.pictures() <= 60


@pytest.mark.slow
def test_the_demo_leaves_pictures(tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "demo.py")
    command = [sys.executable, script, str(tmp_path / "demo")]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # the models are tiny
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread)
    assert run.returncode == 0, run.stderr
    assert "after remove() the bare model's pictures are the same" in run.stdout
    assert_pictures(tmp_path / "demo")


@pytest.mark.slow
def test_the_picture_of_the_rules_is_drawn(tmp_path: Path) -> None:
    result = CliRunner().invoke(compare_rules.main, [str(tmp_path / "rules.png")])
    assert result.exit_code == 0, result.exception
    assert (tmp_path / "rules.png").read_bytes().startswith(b"\x89PNG")
