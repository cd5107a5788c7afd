"""The README and the examples say what is true: their code runs, their names exist."""

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

from klora_compile.cli import main
from klora_compile.rules.catalogue import RULES

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


def test_every_linked_file_exists() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert "runtime/FORMAT.md" in links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_file_named_in_code_style_exists() -> None:
    """Paths such as `klora_compile/reading` in the tables and the text."""
    folders = ("", "klora_compile", "runtime", "runtime/klora_runtime")
    names = re.findall(r"`((?:[a-z_]+/)+[a-z_]*(?:\.py)?|[a-z_]+\.py)`", README)
    assert len(names) > 5
    missing = [
        name
        for name in names
        if not any(
            (ROOT / folder / name).exists() or (ROOT / folder / Path(name).name).exists()
            for folder in folders
        )
    ]
    assert missing == []


def test_every_test_named_as_proof_exists() -> None:
    named = re.findall(r"`(test_\w+)(?:::(test_\w+))?`", README)
    assert named
    for module, function in named:
        (path,) = (ROOT / "tests").rglob(f"{module}.py")
        text = path.read_text()
        assert not function or f"def {function}(" in text


@pytest.mark.parametrize("command", re.findall(r"^klora (\w+) ", README, re.MULTILINE))
def test_every_command_and_option_exists(command: str) -> None:
    help_text = CliRunner().invoke(main, [command, "--help"]).output
    for line in re.findall(rf"^klora {command} .*$", README, re.MULTILINE):
        for option in re.findall(r"(?<=\s)--?[a-z-]+", line):
            assert option in help_text


def test_the_picture_of_the_rules_is_drawn(tmp_path: Path) -> None:
    result = CliRunner().invoke(compare_rules.main, [str(tmp_path / "rules.png")])
    assert result.exit_code == 0, result.exception
    assert (tmp_path / "rules.png").read_bytes().startswith(b"\x89PNG")


def test_every_rule_has_its_lines() -> None:
    assert set(re.findall(r"^\| `([a-z+]+)[^`]*` \|", README, re.MULTILINE)) >= set(RULES)
