"""The main job from end to end: two LoRAs, one artifact, pictures. Run by ``make demo``.

The pipeline is real but tiny and untrained, so its pictures are noise, not things. What they do
show is what each LoRA changes in them, and that the fusion takes from both.

    python examples/demo.py FOLDER
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tiny_pipeline import tiny_lora, tiny_pipeline

from klora_compile import Config, compile_fusion
from klora_runtime import apply_fusion, load_fusion

SEEDS = (0, 1, 2, 3)
STEPS = 20
#: Far stronger than a trained LoRA, so that its effect on textures can be seen.
STRONG: dict[str, Any] = {
    "strength": 3.0,
    "modules": ("to_q", "to_v", "to_out.0", "conv1", "conv2"),
}
PROMPT = "a fox in ink"


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pipe = tiny_pipeline("sd1")
    content = tiny_lora(pipe, folder / "content.safetensors", seed=1, rank=4, **STRONG)
    style = tiny_lora(pipe, folder / "style.safetensors", seed=2, rank=8, **STRONG)
    artifact = folder / "fused.klora.safetensors"
    schedule = folder / "schedule.png"

    klora("compile", content, style, "-o", artifact, "--force")
    klora("inspect", artifact, "--plot", schedule)
    klora("verify", artifact, "--against", content, style)

    # A gamma far to one side makes one LoRA win in every layer at every step.
    only_content = Config(gamma=1e-9, text_encoder="content")
    only_style = Config(gamma=1e9, text_encoder="style")
    rows = {"bare model": pictures(pipe)}
    for label, fusion in {
        "content alone": compile_fusion(content, style, only_content),
        "style alone": compile_fusion(content, style, only_style),
        "fused": load_fusion(artifact),
    }.items():
        with apply_fusion(pipe, fusion) as handle:
            rows[label] = pictures(pipe)
            if label == "fused":
                print(f"\n{handle.report()}")
    restored = np.array_equal(pictures(pipe), rows["bare model"])
    print(f"after remove() the bare model's pictures are {'the same' if restored else 'CHANGED'}")

    sheet = folder / "pictures.png"
    contact_sheet(rows, sheet)
    print(f"\nThe pictures are {sheet} and {schedule}; the artifact is {artifact}.")
    if not restored:
        sys.exit(1)


def klora(*arguments: object) -> None:
    """Run the command line as a user would."""
    command = [sys.executable, "-m", "klora_compile.cli", *map(str, arguments)]
    print(f"\n$ klora {' '.join(map(str, arguments))}", flush=True)
    subprocess.run(command, check=True)


def pictures(pipe: Any) -> list[np.ndarray]:
    """One picture per seed, as (height, width, 3) in [0, 1]."""
    return [
        pipe(
            PROMPT,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images[0]
        for seed in SEEDS
    ]


def contact_sheet(rows: dict[str, list[np.ndarray]], path: Path) -> None:
    """The bare model's pictures, then what each row changes in them; a column per seed."""
    bare = rows["bare model"]
    changes = {label: np.subtract(images, bare) for label, images in rows.items()}
    scale = max(np.abs(change).max() for change in changes.values())
    figure = Figure(figsize=(2 * len(SEEDS), 2 * len(rows)), dpi=100, layout="constrained")
    axes = figure.subplots(len(rows), len(SEEDS), squeeze=False)
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        is_bare = images is bare
        line[0].set_ylabel(label if is_bare else f"change: {label}", fontsize=11)
        for place, image, change in zip(line, images, changes[label], strict=True):
            shown = stretched(image) if is_bare else 0.5 + 0.5 * change / scale
            place.imshow(shown, interpolation="nearest")
            place.set_xticks([])
            place.set_yticks([])
    figure.savefig(path, facecolor="white")


def stretched(image: np.ndarray) -> np.ndarray:
    """Full contrast: an untrained decoder stays near grey."""
    low, high = image.min(), image.max()
    return (image - low) / (high - low)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/demo"))
