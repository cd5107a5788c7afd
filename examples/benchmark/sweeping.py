"""The time that a cell of a sweep takes beside a picture of the bare model.

    make bench-sweeping
    make bench-sweeping ARGS="--steps 50"

Cells and bare pictures take turns on the drawings model. Each cell has another bias, so it makes a
schedule and writes it into the model. What is derived for a rule is timed apart.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import click

from klora_compile.report.table import text_table
from klora_compile.sampling.pictures import Request, arguments, picture
from klora_compile.sampling.pipeline import load_pipeline
from klora_compile.trying.loras import loras_to_try
from klora_compile.trying.studio import Studio
from klora_compile.trying.trial import Trial, trial_of

_DRAWINGS = Path(__file__).parents[1] / "drawings"
_LORAS, _BASE = _DRAWINGS / "loras" / "weights", _DRAWINGS / "base" / "weights"


@click.command()
@click.option("--steps", type=click.IntRange(1, 1000), default=20, show_default=True)
@click.option("--rounds", type=click.IntRange(2, 1000), default=9, show_default=True)
def main(steps: int, rounds: int) -> None:
    """Time cells of a sweep and bare pictures in turns."""
    files = (_LORAS / "subject-penguin.safetensors", _LORAS / "style-ink.safetensors")
    begin = time.perf_counter()
    loras = loras_to_try(*files, device="cpu")
    read = time.perf_counter() - begin
    trials = [_trial(steps, rule="klora", bias=number / rounds) for number in range(rounds)]
    derived = [_trial(steps, rule=rule) for rule in ("np", "ties")]
    begin = time.perf_counter()
    loras.measure(trial.config for trial in (*trials, *derived))
    measured = time.perf_counter() - begin
    bare, held = (_pipeline(loras.components) for _ in range(2))
    with Studio(held, loras) as studio:
        studio.picture(trials[-1])
        _bare(bare, trials[0])
        pictures, cells, changes = [], [], []
        for trial in trials:
            pictures.append(_bare(bare, trial))
            begin = time.perf_counter()
            changes.append(studio.picture(trial).changing)
            cells.append(time.perf_counter() - begin)
        deriving = [studio.picture(trial).deriving for trial in derived]
    rows = [
        ["read both LoRAs", read],
        ["measure what all rules need", measured],
        ["bare picture", median(pictures)],
        ["cell of a sweep", median(cells)],
        ["cell less bare picture", median(b - a for a, b in zip(pictures, cells, strict=True))],
        ["of it to change the settings", median(changes)],
        ["derive for rule np, once a value", deriving[0]],
        ["derive for rule ties, once a value", deriving[1]],
    ]
    told = [[what, f"{seconds:.3f}"] for what, seconds in rows]
    click.echo(text_table(told, heads=(f"{steps} steps, {rounds} rounds", "s"), numbers=True))


def _trial(steps: int, **settings: Any) -> Trial:
    return trial_of({"prompt": "a penguin, ink style", "steps": steps, "guidance": 3.0, **settings})


def _pipeline(components: tuple[str, ...]) -> Any:
    pipe = load_pipeline(str(_BASE), components, device="cpu", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _bare(pipe: Any, trial: Trial) -> float:
    """Return the seconds of a picture without a fusion."""
    begin = time.perf_counter()
    same = arguments(pipe, Request((trial.prompt,), settings=trial.call))
    picture(pipe, trial.prompt, trial.seed, same)
    return time.perf_counter() - begin
