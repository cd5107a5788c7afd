"""The runs in the documentation, each in a process with its number of threads."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import click


@dataclass(frozen=True)
class Run:
    """A call of a part."""

    arguments: str
    """The part and its options, as on a command line."""
    threads: int
    """Number of threads that torch uses on a CPU."""

    def __str__(self) -> str:
        return f"OMP_NUM_THREADS={self.threads} python -m benchmark {self.arguments}"


#: Part -> its runs.
PUBLISHED: Mapping[str, Sequence[Run]] = {
    "race": (
        Run("race", 1),
        Run("race --compile --row peft-active --row merge --row branch --rounds 6", 1),
        Run("race --row merge --row branch --rounds 12", 1),
        Run("race --row peft-active --row merge --row branch --steps 4 --resolution 256", 1),
        Run("race --row peft-active --row merge --row branch --steps 8 --resolution 256", 1),
    ),
    "attach": (Run("attach", 2),),
    "measuring": (
        Run("measuring --rounds 9", 1),
        Run("measuring --rounds 9", 2),
        Run("measuring --cache", 1),
    ),
    "reading": (Run("reading --share 1 --rounds 3", 1),),
    "size": (Run("size", 1),),
    "swapping": (Run("swapping", 2),),
    "sweeping": (Run("sweeping", 1),),
    "catalogue": (Run("catalogue", 1),),
    "before": (Run("before 584a707", 1),),
}


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(list(PUBLISHED)))
def published_command(parts: Sequence[str]) -> None:
    """Run PARTS, or all of them, as the documents print them: about an hour in all."""
    for part in parts or PUBLISHED:
        for run in PUBLISHED[part]:
            click.echo(f"\n$ {run}\n")
            command = [sys.executable, "-m", "benchmark", *shlex.split(run.arguments)]
            threads = {"OMP_NUM_THREADS": str(run.threads)}
            subprocess.run(command, check=True, env={**os.environ, **threads})
