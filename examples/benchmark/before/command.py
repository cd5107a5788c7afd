"""Times cases in the present tree and in an earlier commit, in turns.

    make bench-before ARGS=COMMIT
    make bench-before ARGS="COMMIT --case load-compressed --rounds 21"

Both trees run as processes of one Python, through the command line and the public names. Ratios are
taken within each round; times of processor too, for others may use the machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click
import torch
from tqdm import tqdm

from benchmark.before.cases import CASES, Case
from benchmark.before.trees import Running, Tree, both
from benchmark.timing import Interval, ratios, turns
from klora_compile.report.table import markdown_table

_HEADS = ("case", "seconds before", "now", "times faster", "of processor", "aim")


@click.command()
@click.argument("commit")
@click.option(
    "--case",
    "names",
    type=click.Choice(list(CASES)),
    multiple=True,
    help="Only this one; repeat it for more.  [default: all]",
)
@click.option("--rounds", type=click.IntRange(1, 1000), default=5, show_default=True)
def main(commit: str, names: Sequence[str], rounds: int) -> None:
    """Print how many times faster the present tree is than COMMIT."""
    cases = [CASES[name] for name in names or CASES]
    rows, notes = [], []
    with tempfile.TemporaryDirectory() as name, both(commit, Path(name)) as trees:
        inputs = Path(name) / "inputs"
        inputs.mkdir()
        for case in tqdm(cases, desc="cases", disable=None, leave=False):
            case.inputs(inputs)
            row, note = compare(case, trees, inputs, rounds)
            rows.append(row)
            notes += note
    click.echo(
        f"{commit} and the present tree; CPU, {torch.get_num_threads()} threads; "
        f"{rounds} rounds in turns\n"
    )
    click.echo(markdown_table(_HEADS, rows))
    click.echo("\nMedians; ratios with 95 % bootstrap intervals.")
    click.echo("".join(f"\n* {note}" for note in notes))


def compare(
    case: Case, trees: Sequence[Tree], inputs: Path, rounds: int
) -> tuple[list[str], list[str]]:
    """Return the row of a case, and its facts as lines of text."""
    wall: list[list[float]] = [[] for _ in trees]
    work: list[list[float]] = [[] for _ in trees]
    with ExitStack() as stack:
        running = [stack.enter_context(Running(case, tree, inputs)) for tree in trees]
        for each in running:
            each.set_up()
        for order in turns(len(trees), rounds):
            for place in order:
                seconds, busy = running[place].once()
                wall[place].append(seconds)
                work[place].append(busy)
        facts = [each.facts() for each in running]
    row = [
        case.what,
        *(f"{Interval.of(times).median:.3g}" for times in wall),
        _times(ratios(*wall)),
        _times(ratios(*work)),
        f"{case.aim:g}",
    ]
    names = dict.fromkeys(name for each in facts for name in each)
    pairs = ((name, *(each.get(name) for each in facts)) for name in names)
    return row, [f"{case.name}, {name}: {old} before, {new} now" for name, old, new in pairs]


def _times(values: Sequence[float]) -> str:
    found = Interval.of(values)
    return f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"
