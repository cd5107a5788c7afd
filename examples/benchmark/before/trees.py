"""Two trees of the repository, and the processes that run one case in each of them."""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click

from benchmark.before.cases import Case

ROOT = Path(__file__).parents[3]
_WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class Tree:
    """A tree of the repository with a folder for the files that it makes."""

    name: str
    root: Path
    own: Path

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which Python imports klora from this tree."""
        return {**os.environ, "PYTHONPATH": f"{self.root}{os.pathsep}{self.root / 'runtime'}"}


@contextmanager
def both(commit: str, folder: Path) -> Iterator[tuple[Tree, Tree]]:
    """Make a worktree of ``commit`` below ``folder``; yield it and the present tree.

    Raises:
        click.UsageError: this is no git repository, or it has no such commit.
    """
    place = folder / "before"
    try:
        _git("worktree", "add", "--detach", "--quiet", str(place), f"{commit}^{{commit}}")
    except subprocess.CalledProcessError as error:
        raise click.UsageError(f"git cannot check out {commit}: {error.stderr.strip()}") from error
    try:
        yield _tree(commit, place, folder), _tree("now", ROOT, folder)
    finally:
        _git("worktree", "remove", "--force", str(place))


def _tree(name: str, root: Path, folder: Path) -> Tree:
    own = folder / f"own-{'now' if root == ROOT else 'before'}"
    own.mkdir()
    return Tree(name, root, own)


def _git(*arguments: str) -> None:
    command = ["git", "-C", str(ROOT), *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)


class Running:
    """One case in one tree."""

    def __init__(self, case: Case, tree: Tree, inputs: Path) -> None:
        self._case, self._tree, self._inputs = case, tree, inputs
        self._process = subprocess.Popen(
            [sys.executable, str(_WORKER), str(inputs), str(tree.own)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=tree.environment,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def set_up(self) -> None:
        """Run the setup."""
        self._ask("run", self._case.setup)

    def once(self) -> tuple[float, float]:
        """Return the seconds of one run, and its seconds of processor."""
        if not self._case.command:
            wall, work = self._ask("time", self._case.timed)
            return wall, work
        filled = self._case.command.format(inputs=self._inputs, own=self._tree.own)
        # -P: the folder that this runs in is a tree too, and would come before the environment's.
        command = [sys.executable, "-P", "-m", "klora_compile", *shlex.split(filled)]
        begin, work = time.perf_counter(), _children_seconds()
        done = subprocess.run(command, env=self._tree.environment, capture_output=True, text=True)
        seconds = time.perf_counter() - begin, _children_seconds() - work
        if done.returncode:
            raise click.ClickException(f"{self._where} ended with {done.returncode}: {done.stderr}")
        return seconds

    def facts(self) -> dict[str, float]:
        """Return the case's facts."""
        found: dict[str, float] = self._ask("value", self._case.facts)
        return found

    @property
    def _where(self) -> str:
        return f"case {self._case.name} in tree {self._tree.name}"

    def _ask(self, what: str, code: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([what, code]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the process has ended, which the empty answer shows
        answer = self._process.stdout.readline()
        if not answer:
            raise click.ClickException(f"{self._where} failed; its error is above.")
        return json.loads(answer)


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
