"""Train the accelerator, and show what it changes.

    python -m drawings.accelerator PACKAGES BASE OUT

OUT/accelerator-4.safetensors is the LoRA. OUT/accelerator.png has pictures of training subjects by
the base in 20 guided steps, by the base in 4 guided steps, and by the LoRA in 4 steps without
guidance.
"""

from __future__ import annotations

import random
from pathlib import Path

import click
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from drawings.accelerator.training import Plan, distil
from drawings.accelerator.trajectories import few_step_scheduler, trajectories
from drawings.base.sheet import pasted
from drawings.base.subjects import TRAINING_STYLES, prompt, things
from drawings.loras.training import remove, save

_SHOWN = "red-apple fox door crab pizza cat-face sushi scissors drum owl".split()
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.argument("packages", type=_FOLDER)
@click.argument("base", type=_FOLDER)
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--steps", default=4, show_default=True, help="That the LoRA draws in.")
@click.option("--paths", default=2048, show_default=True, help="From noise to drawings.")
@click.option("--updates", default=2000, show_default=True)
@click.option("--bfloat16", is_flag=True, help="Multiply in bfloat16.")
@click.option("--threads", default=1, show_default=True, help="On the CPU.")
def main(
    packages: Path,
    base: Path,
    out: Path,
    steps: int,
    paths: int,
    updates: int,
    bfloat16: bool,
    threads: int,
) -> None:
    """Distil the guided steps of BASE into a LoRA of few steps, in OUT."""
    torch.set_num_threads(threads)
    pipe = DiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts = _prompts(packages, paths)
    seen = trajectories(pipe, prompts, steps, torch.Generator().manual_seed(0))
    out.mkdir(parents=True, exist_ok=True)
    rows = [_drawn(pipe, 20, 3.0), _drawn(pipe, steps, 3.0)]
    pipe.scheduler = few_step_scheduler(pipe)
    unguided = _drawn(pipe, steps, 1.0)
    loss = distil(pipe, seen, Plan(updates, bfloat16=bfloat16))
    rows.append(_drawn(pipe, steps, 1.0))
    save(pipe, out / f"accelerator-{steps}.safetensors")
    remove(pipe)
    pasted(torch.stack(rows)).save(out / "accelerator.png")
    click.echo(f"mean squared error of the flow of one step in {steps}: {loss:.4f}")
    few = {"the base": rows[1], "the base without guidance": unguided, "the LoRA": rows[2]}
    for name, row in few.items():
        apart = (row - rows[0]).square().mean().sqrt().item()
        click.echo(f"{name} in {steps} steps, from the base's picture in 20: {apart:.3f} rms")


def _prompts(packages: Path, count: int) -> list[str]:
    """Return prompts of training subjects, a fifth of them with the style left open."""
    chance, styles = random.Random(0), list(TRAINING_STYLES)
    subjects = things(packages)
    return [
        prompt(chance.choice(subjects), None if chance.random() < 0.2 else chance.choice(styles))
        for _ in range(count)
    ]


@torch.no_grad()
def _drawn(pipe: StableDiffusionPipeline, steps: int, guidance: float) -> torch.Tensor:
    pictures: torch.Tensor = pipe(
        [prompt(subject, next(iter(TRAINING_STYLES))) for subject in _SHOWN],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images
    return pictures


if __name__ == "__main__":
    main()
