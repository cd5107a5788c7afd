"""What the README shows is what the examples do."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import compare_rules
import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_python_block_is_the_quickstart() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    quickstart = (ROOT / "examples" / "quickstart.py").read_text()
    body = quickstart.partition("# README: begin\n")[2].partition("# README: end")[0]
    assert block == body.replace("  # noqa: E402", "")


def test_the_quickstart_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
    assert "mode merge" in capsys.readouterr().out


def test_the_demo_leaves_pictures(tmp_path: Path) -> None:
    few = ["penguin", "--style", "ink", "--seeds", "1"]
    demo = str(ROOT / "examples" / "demo.py")
    command = [sys.executable, demo, str(tmp_path / "demo"), *few]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # the models are tiny
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread)
    assert run.returncode == 0, run.stderr
    assert "after remove() the bare model's pictures are the same" in run.stdout
    for name in ("pictures.png", "schedule.png"):
        assert (tmp_path / "demo" / name).read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_the_rules_is_drawn(tmp_path: Path) -> None:
    result = CliRunner().invoke(compare_rules.main, [str(tmp_path / "rules.png")])
    assert result.exit_code == 0, result.exception
    assert (tmp_path / "rules.png").read_bytes().startswith(b"\x89PNG")
