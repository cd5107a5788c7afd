"""Train LoRAs on the base model as users do, with PEFT: of a held-out subject or style.

    python -m drawings.train_lora PACKAGES BASE WEIGHTS style ink --updates 700
    python -m drawings.train_lora PACKAGES BASE WEIGHTS subject penguin --updates 250

A style is learnt from the training subjects only, a subject in the training styles only, so no
model has seen the drawing that their fusion is compared with.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from drawings.material import drawing
from drawings.pipeline import DrawingPipeline
from drawings.subjects import STYLES, TRAINING_STYLES, TRAINING_SUBJECTS, prompt
from drawings.train_base import flow_loss, shifted

#: All linear layers of the attention blocks, and the convolutions of the residual blocks, which a
#: style needs to reach the finest level.
_LAYERS = [
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    *("conv1", "conv2"),
]


@click.command()
@click.argument("packages", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("base", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("weights", type=click.Path(file_okay=False, path_type=Path))
@click.argument("kind", type=click.Choice(["subject", "style"]))
@click.argument("name")
@click.option("--updates", default=500, show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--rank", default=8, show_default=True)
@click.option("--rate", default=2e-3, show_default=True, help="Learning rate, falling to 0.")
@click.option("--seed", default=0, show_default=True)
def main(
    packages: Path,
    base: Path,
    weights: Path,
    kind: str,
    name: str,
    updates: int,
    batch: int,
    rank: int,
    rate: float,
    seed: int,
) -> None:
    """Train one LoRA and write it to WEIGHTS/KIND-NAME.safetensors, in PEFT's keys."""
    torch.manual_seed(seed)
    pairs = (
        [(name, style) for style in TRAINING_STYLES]
        if kind == "subject"
        else [(subject, name) for subject in TRAINING_SUBJECTS]
    )
    found = [(drawing(packages, STYLES[style], s), prompt(s, style)) for s, style in pairs]
    pictures = torch.stack([picture for picture, _ in found if picture is not None])
    prompts = [text for picture, text in found if picture is not None]
    pipe = DrawingPipeline.from_pretrained(base)
    pipe.unet.requires_grad_(False).to(torch.float32, memory_format=torch.channels_last)
    pipe.text_encoder.requires_grad_(False).to(torch.float32)
    pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=_LAYERS))
    trained = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    mean = None
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (update + 1) / 20) * (1 - update / updates)
        chosen = torch.randint(len(prompts), (batch,))
        dropped = torch.rand(batch) < 0.1
        texts = ["" if drop else prompts[i] for i, drop in zip(chosen, dropped, strict=True)]
        loss = flow_loss(pipe, shifted(pictures[chosen]), texts)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
    path = weights / f"{kind}-{name}.safetensors"
    weights.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(pipe.unet)
    tensors = {f"unet.{key}": value.half().contiguous() for key, value in state.items()}
    words = prompt(name, "noto").split(",")[0] if kind == "subject" else f"{name} style"
    save_file(tensors, str(path), {"format": "pt", "modelspec.trigger_phrase": words})
    click.echo(f"{path.name}: {len(prompts)} drawings, {updates} updates, loss {mean:.4f}")


if __name__ == "__main__":
    main()
