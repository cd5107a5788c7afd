"""Pictures of fused LoRAs, drawn once and kept as PNG files."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from drawings.evaluation.rules import Rule
from drawings.loras.files import lora_path
from drawings.pipeline import DrawingPipeline
from drawings.subjects import prompt

_STAMP = "weights.sha256"


@dataclass(frozen=True)
class Studio:
    """A studio that draws with one set of weights and keeps the pictures in a folder."""

    pipe: DrawingPipeline
    weights: Path
    """Folder of the LoRAs."""
    folder: Path
    seeds: int
    """Pictures per pair, with noise of seeds 0, 1, ..., the same for every rule."""
    steps: int

    def pictures(self, rule: Rule, subject: str, style: str) -> Tensor:
        """Return (seeds, 3, 48, 48) in [0, 1], from the folder if they are already drawn."""
        path = self.folder / slug(rule.name) / f"{subject}-{style}-{self.steps}.png"
        kept = _read(path) if path.is_file() else None
        if kept is not None and len(kept) >= self.seeds:
            return kept[: self.seeds]
        content, look = (
            lora_path(self.weights, "subject", subject),
            lora_path(self.weights, "style", style),
        )
        generators = [torch.Generator().manual_seed(seed) for seed in range(self.seeds)]
        with rule.way(self.pipe, content, look):
            drawn = self.pipe(
                [prompt(subject, style)] * self.seeds,
                num_inference_steps=self.steps,
                generator=generators,
                output_type="pt",
            ).images
        _write(drawn, path)
        return _read(path)


def claim(folder: Path, weights: Path) -> None:
    """Reserve a folder for pictures of these weights.

    Raises:
        ValueError: it holds pictures of other weights.
    """
    digest = hashlib.sha256()
    for path in sorted(weights.rglob("*.safetensors")):
        digest.update(f"{path.relative_to(weights)}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / _STAMP
    if not stamp.exists():
        stamp.write_text(f"{digest.hexdigest()}\n", encoding="utf-8")
    elif stamp.read_text(encoding="utf-8").strip() != digest.hexdigest():
        raise ValueError(
            f"{folder} holds pictures of other weights than {weights}: name another folder, or "
            "delete this one."
        )


def slug(name: str) -> str:
    """Return a rule's name as a folder name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name.replace("*", "-star"))


def _write(pictures: Tensor, path: Path) -> None:
    """Write pictures side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    strip = torch.cat(list(pictures), dim=2)
    array = (strip * 255).round().byte().permute(1, 2, 0).numpy()
    new = path.with_suffix(".new")
    Image.fromarray(array).save(new, format="png")
    new.replace(path)


def _read(path: Path) -> Tensor:
    strip = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255
    return torch.stack(strip.split(strip.shape[1], dim=2))
