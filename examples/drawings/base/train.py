"""Train the base on the latents of a trained autoencoder.

    python -m drawings.base.train PACKAGES RUN --updates 40000

continues from RUN's last checkpoint if there is one. RUN/base is the pipeline of the latest
averaged weights, and RUN/samples-*.png are its pictures. The learning rate falls in the last fifth
of the updates. To end a training early, start it again with fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from PIL import Image

from drawings.base.arithmetic import arithmetic
from drawings.base.flow import flow_loss, latents, placed
from drawings.base.material import Material, material
from drawings.base.parts import assembled, new_text_encoder, new_tokenizer, new_unet
from drawings.base.progress import Progress
from drawings.base.sheet import pasted
from drawings.base.subjects import TRAINING_STYLES, TUNING_SUBJECTS, prompt, prompts, things
from drawings.base.words import teach
from drawings.material import drawing

_WARMUP, _COOLDOWN = 200, 0.2
#: Each drawing is encoded at so many places, once, before the training.
_PLACES = 9

_SHOWN = "red-apple fox door crab pizza cat-face sushi scissors drum owl".split()


@dataclass(frozen=True)
class Plan:
    """How long to train, and how fast."""

    updates: int
    peak: float
    """Highest learning rate."""
    minutes: float
    """Between checkpoints."""
    sheets: int
    """Updates between sheets of samples."""
    batch: int = 16
    """Drawings per update."""
    bfloat16: bool = False
    """Whether convolutions and products run in bfloat16; weights and optimizer stay float32."""

    def rate(self, update: int) -> float:
        """Learning rate: a short warm-up, a plateau, and a straight line to 0."""
        left = (self.updates - update) / max(1.0, _COOLDOWN * self.updates)
        return self.peak * min(1.0, (update + 1) / _WARMUP, left)


@click.command()
@click.argument("packages", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--start",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A trained base to begin from, such as base/weights; else RUN/vae and untrained models.",
)
@click.option("--updates", default=40_000, show_default=True)
@click.option("--rate", default=1e-3, show_default=True, help="Highest learning rate.")
@click.option("--minutes", default=10.0, show_default=True, help="Between checkpoints.")
@click.option("--sheets", default=500, show_default=True, help="Updates between sheets of samples.")
@click.option("--batch", default=16, show_default=True, help="Drawings per update.")
@click.option(
    "--bfloat16",
    is_flag=True,
    help="Convolve and multiply in bfloat16: faster where the processor has units for it.",
)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=2, show_default=True, help="On the CPU.")
@click.option("--seed", default=0, show_default=True)
def main(
    packages: Path,
    run: Path,
    start: Path | None,
    updates: int,
    rate: float,
    minutes: float,
    sheets: int,
    batch: int,
    bfloat16: bool,
    device: str,
    threads: int,
    seed: int,
) -> None:
    """Train the base on the drawings in PACKAGES."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    seen = material(packages, run).of(things(packages))
    if start is None:
        pipe = untrained(AutoencoderKL.from_pretrained(run / "vae"), seen.names).to(device)
        taught(pipe, seen, run)
    else:
        pipe = trained(start).to(device)
    train(pipe, seen, unseen(packages), run, Plan(updates, rate, minutes, sheets, batch, bfloat16))


def untrained(
    autoencoder: AutoencoderKL, names: Sequence[tuple[str, str]]
) -> StableDiffusionPipeline:
    """Return a pipeline with a trained autoencoder, a tokenizer, and untrained models."""
    tokenizer = new_tokenizer(prompt(subject, style) for subject, style in names)
    autoencoder.requires_grad_(False)
    return assembled(autoencoder, new_unet(), new_text_encoder(tokenizer), tokenizer)


def trained(folder: Path) -> StableDiffusionPipeline:
    """Return a trained pipeline in float32, of which the denoiser is trained further."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    return pipe


def taught(pipe: StableDiffusionPipeline, seen: Material, run: Path, updates: int = 3000) -> None:
    """Give the pipeline a text encoder that knows what the drawings look like; RUN/words keeps it.

    The denoiser is trained beside it, and it stays as it is.
    """
    kept = run / "words"
    if kept.is_dir():
        pipe.text_encoder = type(pipe.text_encoder).from_pretrained(kept).to(pipe.device)
    else:
        clean = torch.cat([latents(pipe, some) for some in seen.scaled().split(64)])
        with torch.random.fork_rng(devices=[]):
            untold = teach(pipe, clean, seen.names, updates)
        print(f"words leave {untold:.0%} of the drawings' variance open", flush=True)
        pipe.text_encoder.save_pretrained(run / "words.new")
        (run / "words.new").rename(kept)
    pipe.text_encoder.requires_grad_(False)


def unseen(packages: Path) -> Material:
    """Render the tuning subjects in two training styles; no base is trained on them."""
    names = [(subject, style) for subject in TUNING_SUBJECTS for style in list(TRAINING_STYLES)[:2]]
    drawn = [drawing(packages, TRAINING_STYLES[style], subject) for subject, style in names]
    pictures = [picture for picture in drawn if picture is not None]
    return Material(((torch.stack(pictures) + 1) * 127.5).round().byte(), names)


def train(
    pipe: StableDiffusionPipeline, seen: Material, others: Material, run: Path, plan: Plan
) -> None:
    """Train from the last checkpoint in RUN to the plan's end."""
    pipe.unet.to(memory_format=torch.channels_last).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        places = placed(pipe, seen.scaled(), _PLACES)
    weights = list(pipe.unet.parameters())
    average = EMAModel(weights, decay=0.9995, use_ema_warmup=True, power=0.75, foreach=True)
    optimizer = torch.optim.AdamW(
        weights, lr=plan.peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    keepers = {"unet": pipe.unet, "average": average, "optimizer": optimizer}
    progress = Progress(run, keepers, plan.minutes)
    progress.resume()
    average.to(pipe.device)
    print(f"{len(seen.names)} drawings, {sum(w.numel() for w in weights) / 1e6:.1f} M weights")
    while progress.update < plan.updates:
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(progress.update)
        chosen = torch.randint(len(seen.names), (plan.batch,))
        clean = places[torch.randint(_PLACES, (plan.batch,)), chosen].to(pipe.device)
        names = [seen.names[index] for index in chosen.tolist()]
        optimizer.zero_grad(set_to_none=True)
        with arithmetic(pipe.device.type, plan.bfloat16):
            loss = flow_loss(pipe, clean, prompts(names))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        average.step(weights)
        progress.step(loss.item())
        last, showing = progress.update == plan.updates, progress.update % plan.sheets == 0
        if progress.due or last or showing:
            average.store(weights)
            average.copy_to(weights)
            pipe.save_pretrained(run / "base")
            facts = {"unseen": _unseen_loss(pipe, others)}
            if last or showing:
                sheet(pipe).save(run / f"samples-{progress.update:06}.png")
            average.restore(weights)
            progress.save(facts)


@torch.no_grad()
def _unseen_loss(pipe: StableDiffusionPipeline, others: Material) -> float:
    """Compute the loss on drawings outside the training, with the same noise each time."""
    generator = torch.Generator().manual_seed(0)
    clean = latents(pipe, others.scaled())
    prompts = [prompt(*name) for name in others.names]
    return round(flow_loss(pipe, clean, prompts, generator).item(), 5)


@torch.no_grad()
def sheet(pipe: StableDiffusionPipeline) -> Image.Image:
    """Draw some training subjects: two rows in a style each, and one that leaves the style open."""
    styles = [*list(TRAINING_STYLES)[::2], None]
    rows = []
    for style in styles:
        drawn = pipe(
            [prompt(subject, style) for subject in _SHOWN],
            num_inference_steps=10,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(1),
            output_type="pt",
        ).images
        rows.append(drawn.cpu())
    return pasted(torch.stack(rows))


if __name__ == "__main__":
    main()
