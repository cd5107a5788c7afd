"""What the documents print is run as it is written, each part with the threads that it states."""

from __future__ import annotations

import shlex
from typing import Any

import click
import pytest
from benchmark.__main__ import main
from benchmark.published import PUBLISHED
from click.testing import CliRunner


def calls(monkeypatch: pytest.MonkeyPatch, *parts: str) -> list[tuple[list[str], str]]:
    """The arguments and the number of threads of each process that is started."""
    seen: list[tuple[list[str], str]] = []

    def started(command: list[str], *, check: bool, env: dict[str, str]) -> None:
        assert check
        seen.append((command[3:], env["OMP_NUM_THREADS"]))

    monkeypatch.setattr("benchmark.published.subprocess.run", started)
    result = CliRunner().invoke(main, ["published", *parts], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.count("$ OMP_NUM_THREADS=") == len(seen)
    return seen


def test_all_parts_are_run_or_those_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = [run for runs in PUBLISHED.values() for run in runs]
    assert len(calls(monkeypatch)) == len(everything)
    assert calls(monkeypatch, "attach") == [(["attach"], "2")]


@pytest.mark.parametrize("part", PUBLISHED)
def test_every_published_run_is_one_of_its_part(part: str) -> None:
    command: Any = main.commands[part]
    for run in PUBLISHED[part]:
        name, *arguments = shlex.split(run.arguments)
        assert name == part
        with click.Context(command) as context:
            command.parse_args(context, arguments)  # raises where an option is unknown
