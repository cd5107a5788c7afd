"""Train the base model on the training subjects in the training styles.

    python -m drawings.train_base PACKAGES RUN --updates 6000

writes a checkpoint and a sheet of samples into RUN every few minutes, and goes on from the last
checkpoint where there is one.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image
from torch.nn.functional import mse_loss, pixel_unshuffle

from drawings.material import drawing
from drawings.pipeline import PATCH, DrawingPipeline, new_pipeline
from drawings.subjects import (
    HELD_OUT_SUBJECTS,
    STYLES,
    TRAINING_STYLES,
    TRAINING_SUBJECTS,
    prompt,
)

_BATCH, _WARMUP, _DROPOUT, _AVERAGE = 16, 200, 0.1, 0.999


@click.command()
@click.argument("packages", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("run", type=click.Path(file_okay=False, path_type=Path))
@click.option("--updates", default=6000, show_default=True)
@click.option("--every", default=250, show_default=True, help="Updates between checkpoints.")
@click.option("--rate", "peak", default=8e-4, show_default=True, help="Highest learning rate.")
@click.option(
    "--subjects",
    default=len(TRAINING_SUBJECTS),
    show_default=True,
    help="How many, from the first.",
)
@click.option(
    "--start",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A trained base to go on from, such as RUN/base of an earlier training.",
)
@click.option("--seed", default=0, show_default=True)
def main(
    packages: Path,
    run: Path,
    updates: int,
    every: int,
    peak: float,
    subjects: int,
    start: Path | None,
    seed: int,
) -> None:
    """Train the base model on the drawings in PACKAGES; checkpoints go to the folder RUN."""
    torch.manual_seed(seed)
    run.mkdir(parents=True, exist_ok=True)
    pictures, prompts = material(packages, TRAINING_SUBJECTS[:subjects])
    words = ["a", "style", *STYLES, *TRAINING_SUBJECTS, *HELD_OUT_SUBJECTS]
    pipe = new_pipeline(words)
    if start is not None:
        take_over(DrawingPipeline.from_pretrained(start), pipe)
    pipe.unet.to(memory_format=torch.channels_last)
    models = torch.nn.ModuleDict({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    average = copy.deepcopy(models).requires_grad_(False)
    optimizer = torch.optim.AdamW(models.parameters(), lr=peak, weight_decay=0.01, fused=True)
    click.echo(
        f"{len(prompts)} drawings, {sum(p.numel() for p in models.parameters()) / 1e6:.1f} M"
    )
    first = _resume(run, models, average, optimizer)
    begin, losses = time.time(), []
    for update in range(first, updates):
        for group in optimizer.param_groups:
            group["lr"] = rate(update, updates, peak)
        chosen = torch.randint(len(prompts), (_BATCH,))
        dropped = torch.rand(_BATCH) < _DROPOUT
        texts = ["" if drop else prompts[i] for i, drop in zip(chosen, dropped, strict=True)]
        loss = flow_loss(pipe, shifted(pictures[chosen]), texts)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            decay = min(_AVERAGE, (update + 1) / (update + 10))
            for mean, value in zip(average.parameters(), models.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        if (update + 1) % every == 0 or update + 1 == updates:
            state = {
                "update": update + 1,
                "models": models.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            torch.save(state, run / "checkpoint.new")
            (run / "checkpoint.new").replace(run / "checkpoint.pt")
            final = averaged(pipe, average)
            final.save_pretrained(run / "base")
            if (update + 1) % (4 * every) == 0 or update + 1 == updates:
                sheet(final).save(run / f"samples-{update + 1:05}.png")
            mean = sum(losses) / len(losses)
            seconds = (time.time() - begin) / (update + 1 - first)
            click.echo(f"update {update + 1}: loss {mean:.4f}, {seconds:.2f} s an update")
            losses = []


def material(packages: Path, subjects: Sequence[str]) -> tuple[torch.Tensor, list[str]]:
    """Return drawings in the training styles, (drawings, 3, 48, 48), and their prompts."""
    pictures, prompts = [], []
    for subject in subjects:
        for style, package in TRAINING_STYLES.items():
            picture = drawing(packages, package, subject)
            if picture is not None:
                pictures.append(picture)
                prompts.append(prompt(subject, style))
    return torch.stack(pictures), prompts


def take_over(trained: DrawingPipeline, pipe: DrawingPipeline) -> None:
    """Give ``pipe`` the weights of a trained pipeline that may know fewer words."""
    pipe.unet.load_state_dict(trained.unet.float().state_dict())
    state = trained.text_encoder.float().state_dict()
    (name,) = (name for name in state if name.endswith("token_embedding.weight"))
    rows = pipe.text_encoder.state_dict()[name].clone()
    words = pipe.tokenizer.get_vocab()
    for word, index in trained.tokenizer.get_vocab().items():
        rows[words[word]] = state[name][index]
    pipe.text_encoder.load_state_dict({**state, name: rows})


def rate(update: int, updates: int, peak: float) -> float:
    """Return the learning rate: a short warm-up, then a cosine down to a twentieth."""
    if update < _WARMUP:
        return peak * (update + 1) / _WARMUP
    done = (update - _WARMUP) / max(1, updates - _WARMUP)
    return peak * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)


def shifted(pictures: torch.Tensor) -> torch.Tensor:
    """Return each picture shifted by up to two pixels, filled with white."""
    padded = torch.nn.functional.pad(pictures, (2, 2, 2, 2), value=1.0)
    height, width = pictures.shape[-2:]
    tops, lefts = torch.randint(0, 5, (2, len(pictures))).tolist()
    return torch.stack(
        [p[:, y : y + height, x : x + width] for p, y, x in zip(padded, tops, lefts, strict=True)]
    )


def flow_loss(pipe: Any, pictures: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """Return the loss of rectified flow: predict noise - drawing at a random point between them."""
    x = pixel_unshuffle(pictures, PATCH)
    noise = torch.randn_like(x)
    sigma = torch.sigmoid(torch.randn(len(x)))
    at = sigma[:, None, None, None]
    states = pipe.encode(texts)
    flow = pipe.unet(at * noise + (1 - at) * x, 1000 * sigma, encoder_hidden_states=states).sample
    return mse_loss(flow, noise - x)


def averaged(pipe: DrawingPipeline, average: torch.nn.ModuleDict) -> DrawingPipeline:
    """Return a pipeline of the averaged weights."""
    return DrawingPipeline(average["unet"], pipe.scheduler, average["text_encoder"], pipe.tokenizer)


def sheet(pipe: DrawingPipeline, subjects: int = 12) -> Image.Image:
    """Return pictures of some training subjects, a row for each training style."""
    pipe.set_progress_bar_config(disable=True)
    chosen = TRAINING_SUBJECTS[:subjects]
    texts = [prompt(subject, style) for style in TRAINING_STYLES for subject in chosen]
    drawn = pipe(texts, generator=torch.Generator().manual_seed(1)).images
    paper = Image.new("RGB", (50 * len(chosen), 50 * len(TRAINING_STYLES)), "white")
    for index, picture in enumerate(drawn):
        row, column = divmod(index, len(chosen))
        paper.paste(picture, (50 * column, 50 * row))
    return paper


def _resume(run: Path, models: Any, average: Any, optimizer: Any) -> int:
    path = run / "checkpoint.pt"
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    models.load_state_dict(state["models"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["update"])


if __name__ == "__main__":
    main()
