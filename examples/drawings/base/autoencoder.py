"""Train the autoencoder, whose latents the base denoises.

    python -m drawings.base.autoencoder PACKAGES RUN --updates 4000

continues from RUN's last checkpoint if there is one, and ends with the folder RUN/vae. Later its
decoder can be trained further. The latents stay, so a trained base stays valid:

    python -m drawings.base.autoencoder PACKAGES RUN --updates 4000 --decoder-only
"""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path

import click
import torch
from diffusers import AutoencoderKL
from torch.nn.functional import l1_loss

from drawings.base.material import Material, material, recoloured
from drawings.base.parts import new_autoencoder
from drawings.base.progress import Progress
from drawings.base.sheet import pasted

_BATCH, _WARMUP = 8, 50
#: Of the Kullback-Leibler term, mean over latents, against the L1 term, mean over pixels: makes the
#: decoder read through the little noise that a denoiser leaves.
_PRIOR = 1e-3


@click.command()
@click.argument("packages", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("run", type=click.Path(file_okay=False, path_type=Path))
@click.option("--updates", default=4000, show_default=True)
@click.option("--rate", "peak", default=2e-3, show_default=True, help="Highest learning rate.")
@click.option("--minutes", default=10.0, show_default=True, help="Between checkpoints.")
@click.option("--decoder-only", is_flag=True, help="Keep the latents as they are.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=2, show_default=True, help="On the CPU.")
@click.option("--seed", default=0, show_default=True)
def main(
    packages: Path,
    run: Path,
    updates: int,
    peak: float,
    minutes: float,
    decoder_only: bool,
    device: str,
    threads: int,
    seed: int,
) -> None:
    """Train the autoencoder on the drawings in PACKAGES; all it writes goes to the folder RUN."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    done = run / "vae"
    if done.is_dir() and not decoder_only:
        click.echo(f"{done} is trained already; --decoder-only trains its decoder further.")
        return
    seen = material(packages, run)
    if decoder_only:
        vae = AutoencoderKL.from_pretrained(done)
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    else:
        vae = new_autoencoder()
    folder = run / ("decoder" if decoder_only else "autoencoder")
    train(vae.to(device), seen, folder, updates, peak, minutes)
    ready = vae if decoder_only else standardised(vae, some(seen).to(device))
    new = run / "vae.new"
    ready.save_pretrained(new)
    shutil.rmtree(done, ignore_errors=True)
    new.rename(done)


def train(
    vae: AutoencoderKL, seen: Material, folder: Path, updates: int, peak: float, minutes: float
) -> None:
    """Train from the last checkpoint in the folder to ``updates``."""
    weights = [weight for weight in vae.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=peak, weight_decay=0.0, fused=True)
    progress = Progress(folder, {"vae": vae, "optimizer": optimizer}, minutes)
    progress.resume()
    while progress.update < updates:
        for group in optimizer.param_groups:
            group["lr"] = _rate(progress.update, updates, peak)
        loss = _loss(vae, recoloured(seen.sample(_BATCH)[0]).to(vae.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        progress.step(loss.item())
        if progress.due or progress.update == updates:
            progress.save(_show(vae, some(seen), folder / "samples.png"))


def some(seen: Material) -> torch.Tensor:
    """Return a part of the drawings, always the same, (256, 3, height, width) in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(seen.names), (256,), generator=generator)
    return seen.pictures[chosen].float() / 127.5 - 1


def _loss(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Add the L1 of pixels and of differences between neighbours, and the prior of latents."""
    latents = vae.encode(pictures).latent_dist
    noise = torch.randn(latents.mean.shape).to(vae.device)
    drawn = vae.decode(latents.mean + latents.std * noise).sample
    edges = [l1_loss(drawn.diff(dim=axis), pictures.diff(dim=axis)) for axis in (-1, -2)]
    prior = latents.kl().mean() / latents.mean[0].numel()
    return l1_loss(drawn, pictures) + sum(edges) / 2 + _PRIOR * prior


def _rate(update: int, updates: int, peak: float) -> float:
    """Learning rate: a short warm-up, then a cosine to a hundredth."""
    done = update / max(1, updates)
    return (
        peak * min(1.0, (update + 1) / _WARMUP) * (0.01 + 0.99 * math.cos(math.pi * done / 2) ** 2)
    )


@torch.no_grad()
def _show(vae: AutoencoderKL, pictures: torch.Tensor, path: Path) -> dict[str, float]:
    """Draw a sheet, originals above reconstructions, and measure the error."""
    pictures = pictures[:16].to(vae.device)
    latents = vae.encode(pictures).latent_dist
    rows = torch.stack([pictures, vae.decode(latents.mean).sample]).cpu().clamp(-1, 1) / 2 + 0.5
    pasted(rows).save(path)
    noise = latents.std.mean((0, 2, 3)) / latents.mean.std((0, 2, 3))
    return {
        "error_of_the_range": round(l1_loss(rows[0], rows[1]).item(), 4),
        "noise_of_the_spread": round(noise.median().item(), 3),
    }


@torch.no_grad()
def standardised(vae: AutoencoderKL, pictures: torch.Tensor) -> AutoencoderKL:
    """Return the same autoencoder with latents of mean 0 and spread 1 in every channel.

    Stable Diffusion's pipeline knows one scale for all channels and no offset. So both go into the
    1 x 1 convolutions on either side of the latents.

    Args:
        pictures: mean and spread are measured on these, (n, 3, height, width) in [-1, 1].
    """
    vae = copy.deepcopy(vae)
    latents = vae.encode(pictures).latent_dist.mean
    mean, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    # A channel without information stays small, or its noise would count as much as the others.
    spread = spread.clamp(min=0.2 * spread.max().item())
    channels = len(mean)
    before, after = vae.quant_conv, vae.post_quant_conv
    after.bias.add_(after.weight[:, :, 0, 0] @ mean)
    after.weight.mul_(spread[:, None, None])
    before.bias[:channels].sub_(mean).div_(spread)
    before.weight[:channels].div_(spread[:, None, None, None])
    before.bias[channels:].sub_(2 * spread.log())
    return vae


if __name__ == "__main__":
    main()
