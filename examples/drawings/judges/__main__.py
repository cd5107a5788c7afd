"""Fit the judges and measure them; RUN/judges.pt and RUN/judges.json are written.

    python -m drawings.judges PACKAGES RUN

RUN holds the autoencoder (``vae/``). The base's own pictures are added with ``--base``.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import click
import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from drawings.base.subjects import (
    HELD_OUT_SUBJECTS,
    STYLES,
    TRAINING_STYLES,
    prompt,
    training_subjects,
)
from drawings.judges.check import check
from drawings.judges.fitted import Judges
from drawings.material import Gallery, gallery
from klora_compile.judging.networks import available

#: Latents are taken this far from the autoencoder's before they are decoded, in spreads.
_NOISE = 0.1

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.argument("packages", type=_FOLDER)
@click.argument("run", type=_FOLDER)
@click.option("--subjects", default=480, show_default=True, help="Training subjects to fit on.")
@click.option("--base", is_flag=True, help="Fit on samples of RUN/base too.")
@click.option("--threads", default=1, show_default=True, help="On the CPU.")
def main(packages: Path, run: Path, subjects: int, base: bool, threads: int) -> None:
    """Fit judges of subjects and of styles on drawings in PACKAGES, true and degraded."""
    torch.set_num_threads(threads)
    missing = available()
    if missing:
        raise click.ClickException(missing)
    training = gallery(packages, _widespread(packages, subjects), STYLES)
    drawn = [decoded(AutoencoderKL.from_pretrained(run / "vae"), training)]
    if base:
        drawn.append(_sampled(run / "base", training))
    judges = Judges.fit(training, drawn)
    judges.save(run / "judges.pt")
    held_out = gallery(packages, HELD_OUT_SUBJECTS, STYLES)
    found = check(judges.subject, judges.style, judges.looks, held_out)
    text = json.dumps(found, indent=1)
    (run / "judges.json").write_text(f"{text}\n", encoding="utf-8")
    click.echo(text)


def _widespread(packages: Path, count: int) -> list[str]:
    """Return training subjects that nearly all styles have, in a random order."""
    subjects = list(training_subjects(packages))
    random.Random(0).shuffle(subjects)
    found: list[str] = []
    for subject in subjects:
        if len(found) < count and len(gallery(packages, [subject], STYLES).names) > len(STYLES) - 3:
            found.append(subject)
    return found


@torch.no_grad()
def decoded(autoencoder: AutoencoderKL, drawings: Gallery) -> Gallery:
    """Encode drawings, add a little noise to the latents, and decode them again."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for some in drawings.pictures.split(32):
        latents = autoencoder.encode(some * 2 - 1).latent_dist.mean
        latents = latents + _NOISE * torch.randn(latents.shape, generator=generator)
        parts.append(autoencoder.decode(latents).sample.clamp(-1, 1) / 2 + 0.5)
    return Gallery(drawings.names, torch.cat(parts))


@torch.no_grad()
def _sampled(base: Path, drawings: Gallery) -> Gallery:
    """Draw the training subjects in the training styles with the base."""
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    names = tuple(name for name in drawings.names if name[1] in TRAINING_STYLES)
    parts = [
        pipe(
            [prompt(*name) for name in names[first : first + 16]],
            num_inference_steps=10,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(first),
            output_type="pt",
        ).images.float()
        for first in range(0, len(names), 16)
    ]
    return Gallery(names, torch.cat(parts))


if __name__ == "__main__":
    main()
