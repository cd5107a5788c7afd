"""The script that times the present tree beside a commit: each tree runs its own code, in turns."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from benchmark.before import command, trees
from benchmark.before.cases import CASES, Case
from click.testing import CliRunner, Result

CASE = Case(
    "speed",
    "a module of the tree",
    2.0,
    inputs=lambda folder: (folder / "number").write_text("7"),
    setup="import speed; read = int((inputs / 'number').read_text())",
    timed="(own / 'runs').open('a').write('x')",
    facts="{'speed': speed.SPEED, 'read': read, 'runs': len((own / 'runs').read_text())}",
)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, whose module has changed since."""
    root = tmp_path / "repository"
    root.mkdir()
    module = root / "speed.py"
    module.write_text("SPEED = 1\n")
    _git(root, "init", "--quiet")
    _git(root, "add", ".")
    _git(root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "slow")
    module.write_text("SPEED = 10\n")
    monkeypatch.setattr(trees, "ROOT", root)
    monkeypatch.setattr("benchmark.before.command.CASES", {CASE.name: CASE})
    return root


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command.main, arguments, catch_exceptions=False)


def test_each_tree_runs_its_own_code_once_a_round(repository: Path) -> None:
    result = run("HEAD", "--rounds", "3")
    assert result.exit_code == 0, result.output
    (row,) = [line for line in result.output.splitlines() if line.startswith("| a module")]
    assert row.endswith("| 2 |")
    assert "* speed, speed: 1 before, 10 now" in result.output
    assert "* speed, read: 7 before, 7 now" in result.output
    assert "* speed, runs: 3 before, 3 now" in result.output
    assert len(_git(repository, "worktree", "list").splitlines()) == 1


def test_a_command_runs_in_its_own_tree_wherever_the_script_runs(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = repository / "klora_compile" / "__main__.py"
    main.parent.mkdir()
    main.with_name("__init__.py").touch()
    code = "import sys, pathlib\npathlib.Path(sys.argv[1], 'made').write_text('{}')\n"
    main.write_text(code.format(1))
    _git(repository, "add", "klora_compile")
    _git(repository, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "one")
    main.write_text(code.format(2))
    facts = "{'made': int((own / 'made').read_text())}"
    case = Case("command", "a command", 1.0, command="{own}", facts=facts)
    monkeypatch.setattr("benchmark.before.command.CASES", {case.name: case})
    monkeypatch.chdir(repository)
    result = run("HEAD", "--rounds", "1")
    assert result.exit_code == 0, result.output
    assert "* command, made: 1 before, 2 now" in result.output


def test_an_unknown_commit_is_an_error(repository: Path) -> None:
    result = run("nowhere")
    assert result.exit_code == 2
    assert "git cannot check out nowhere" in result.output


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case("bad", "raises", 1.0, timed="1 / 0"), "case bad in tree HEAD failed"),
        (Case("bad", "is refused", 1.0, command="nothing"), "case bad in tree HEAD ended with 2"),
    ],
)
def test_a_case_that_fails_ends_the_run_and_removes_the_worktree(
    repository: Path, monkeypatch: pytest.MonkeyPatch, case: Case, message: str
) -> None:
    monkeypatch.setattr(command, "turns", _in_order)
    monkeypatch.setattr("benchmark.before.command.CASES", {case.name: case})
    result = run("HEAD")
    assert result.exit_code == 1
    assert message in result.output
    assert len(_git(repository, "worktree", "list").splitlines()) == 1


def _in_order(count: int, rounds: int) -> list[Sequence[int]]:
    return [range(count)] * rounds


def test_every_case_is_timed_in_one_way_and_is_valid_python() -> None:
    for name, case in CASES.items():
        assert name == case.name
        assert bool(case.timed) != bool(case.command), name
        for code in (case.setup, case.timed):
            compile(code, name, "exec")
        compile(case.facts, name, "eval")
