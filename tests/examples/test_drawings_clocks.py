"""Which clock a schedule should follow, measured on drawings."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import DPMSolverMultistepScheduler
from drawings.clocks import __main__ as run
from drawings.clocks.rows import CLOCKS, MANY, PATTERNS, PLACES, ROWS, SHIFTS, STEPS, name_of
from drawings.clocks.written import markdown
from drawings.loras.recipes import Recipe
from drawings.table.rows import REFERENCE, Material

MATERIAL = Material(
    [Recipe("subject", "penguin", (("penguin", "noto"),), ("a penguin",))],
    [Recipe("style", "ink", (("fox", "ink"),), ("a fox, ink",))],
    lambda subject, style: True,
)


def test_the_rows_are_the_sum_and_each_pattern_by_each_clock() -> None:
    names = [row.name for row in ROWS]
    assert names == [REFERENCE, *(name_of(p, c) for p in PATTERNS for c in CLOCKS)]
    assert {row.name for row in ROWS} == set(names)
    assert len({place.of("x") for place in PLACES}) == len(SHIFTS) * len(STEPS)


class Pipe:
    """Draws grey of 1 / steps, and notes what it was asked."""

    def __init__(self) -> None:
        config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0}
        self.scheduler = DPMSolverMultistepScheduler(**config)
        self.first = self.scheduler
        self.asked: list[tuple[float, int]] = []

    def set_progress_bar_config(self, disable: bool) -> None: ...

    def __call__(self, prompts: list[str], num_inference_steps: int, **_: Any) -> Any:
        self.asked.append((self.scheduler.config.flow_shift, num_inference_steps))
        grey = torch.full((len(prompts), 3, 4, 4), 1 / num_inference_steps)
        return SimpleNamespace(images=grey)


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Pipe:
    found = Pipe()
    judges: Any = SimpleNamespace(
        subject=lambda pictures: torch.ones(len(pictures), 1),
        style=lambda pictures: torch.ones(len(pictures), 1),
        distance=lambda a, b: (a - b).abs().mean((1, 2, 3)),
        looks={"ink": torch.tensor([0.5])},
    )
    monkeypatch.setattr(
        run, "DiffusionPipeline", SimpleNamespace(from_pretrained=lambda path: found)
    )
    monkeypatch.setattr(run, "Judges", SimpleNamespace(load=lambda path: judges))
    monkeypatch.setattr(run, "material_of", lambda *_: MATERIAL)
    monkeypatch.setattr(run, "digests", lambda *_: {"base": "aa"})
    monkeypatch.setattr(run, "drawing", lambda *_: torch.ones(3, 4, 4))
    monkeypatch.setattr(run, "files", lambda folder, cell: [])
    still = [replace(row, act=lambda pipe, files: nullcontext()) for row in ROWS]
    monkeypatch.setattr(run, "ROWS", still)
    return found


def compare(place: Path) -> Any:
    threads = torch.get_num_threads()
    done = CliRunner().invoke(run.main, [*[str(place)] * 3, str(place / "out"), "entangled"])
    torch.set_num_threads(threads)
    return done


def test_every_row_is_drawn_once_at_every_place(pipe: Pipe, tmp_path: Path) -> None:
    done = compare(tmp_path)
    assert done.exit_code == 0, done.output
    wanted = [(shift, steps) for shift in SHIFTS for steps in (MANY, *STEPS)]
    assert pipe.asked == wanted * len(ROWS)
    assert pipe.scheduler is pipe.first
    lines = (tmp_path / "out" / "clocks-entangled.md").read_text().splitlines()
    (first,) = (line for line in lines if line.startswith(f"| {REFERENCE} | 1 | 4 |"))
    far = f"{1 / 4 - 1 / MANY:.3f}"
    assert first.endswith(f"| 0.750 (0.750 to 0.750) | {far} ({far} to {far}) |")
    assert sum(line.startswith("| K-LoRA s* |") for line in lines) == len(PLACES)
    assert compare(tmp_path).exit_code == 0
    assert len(pipe.asked) == len(wanted) * len(ROWS)  # all kept


def test_a_stopped_cell_goes_on_at_the_places_that_lack(pipe: Pipe, tmp_path: Path) -> None:
    compare(tmp_path)
    kept = tmp_path / "out" / "clocks-entangled.jsonl"
    kept.write_text("\n".join(kept.read_text().splitlines()[:-1]) + "\n")
    pipe.asked.clear()
    compare(tmp_path)
    assert pipe.asked == [(SHIFTS[-1], MANY), (SHIFTS[-1], STEPS[-1])]


def test_differences_are_noise_minus_step() -> None:
    def verdicts(both: float) -> Any:
        return {"a, ink": [{"both": both, "distance": 0.5, "many": 0.1}]}

    place = PLACES[0]
    step, noise = (place.of(name_of("s", clock)) for clock in CLOCKS)
    text = markdown({step: verdicts(0.25), noise: verdicts(0.5)})
    assert "| K-LoRA s | 1 | 4 | +0.250 (+0.250 to +0.250) | +0.000" in text
    assert "K-LoRA s* |" not in text
