"""The fusion of `golden/tiny.klora.safetensors`: built by hand, one entry for every fate.

Written anew with ``python tests/golden_fusion.py``, only when the format itself changes.
"""

from __future__ import annotations

from typing import Any

import torch

from klora_runtime.artifact.delta import LowRank, Stored
from klora_runtime.artifact.file import save_fusion
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.schedule import Rule, Slot, Source
from klora_runtime.artifact.timeline import Timeline

GAMMA = 0.75
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def golden_fusion() -> Fusion:
    """Two sources, two slots, every fate, every dtype, a convolution and a shared tensor."""
    return Fusion(
        sources={
            "content": Source(
                file="fox.safetensors",
                sha256="c0" * 32,
                bytes=1234,
                layout="peft",
                ranks=(1, 2),
                trigger_words=("a sks fox ✓",),
                license="apache-2.0",
            ),
            "style": Source(
                file="ink.safetensors", sha256="5e" * 32, bytes=999, layout="kohya", ranks=(2,)
            ),
        },
        slots={
            "content": Slot("content", ("content",)),
            "style": Slot("style", ("style",)),
        },
        rule=Rule(
            "klora",
            {"pattern": "s", "alpha": 1.5, "beta": 0.5, "gamma": "paper", "tie": "content"},
            {"gamma": {"unet": GAMMA}},
        ),
        family=None,
        entries=tuple(_entries()),
        tool="klora 0.1.0",
    )


def switching_entry() -> Entry:
    """The entry that FORMAT.md shows."""
    down_c, up_c = _pair(3, 4, rank=1, first=1.0)
    down_s, up_s = _pair(3, 4, rank=2, first=-2.0, dtype=torch.float16)
    return _entry(
        "unet",
        f"{ATTENTION}.to_q",
        "switching",
        Timeline((0.0, 0.375), {"content": (1.0, 0.0), "style": (0.0, 1.0)}),
        {
            "content": Stored(1.0, LowRank(down_c, up_c)),
            "style": Stored(0.5, LowRank(down_s, up_s)),
        },
        scores={
            "k": 2,
            "ratio": 1.0625,
            "content": {"rank": 1, "scaling": 1.0, "l1": 20.0, "top_k": 12.75},
            "style": {"rank": 2, "scaling": 0.5, "l1": 30.0, "top_k": 16.0},
        },
    )


def _entries() -> list[Entry]:
    down, up = _pair(3, 4, rank=2, first=0.25, dtype=torch.bfloat16)
    conv_down, conv_up = _pair(2, 2, rank=1, first=0.5, kernel=(3, 3))
    both = {"content": Stored(0.5, LowRank(down, up)), "style": Stored(2.0, LowRank(down, up))}
    content, style = {"content": both["content"]}, {"style": both["style"]}
    return [
        _entry("text_encoder", "encoder.layers.0.mlp.fc1", "constant", _row(1.0, 0.8), both),
        _entry("unet", "conv_in", "always content", _row(1.0, 0.0),
               {"content": Stored(1.0, LowRank(conv_down, conv_up))}),
        _entry("unet", f"{ATTENTION}.to_k", "always style", _row(0.0, 1.0), style),
        _entry("unet", f"{ATTENTION}.to_out.0", "zero", _row(0.0, 0.0), {}),
        switching_entry(),
        _entry("unet", f"{ATTENTION}.to_v", "one-sided", _row(1.0, 0.0), content),
        _entry("unet", "time_embedding.linear_1", "dropped", _row(0.0, 0.0), {}),
    ]  # fmt: skip


def _entry(
    component: str,
    module: str,
    fate: str,
    timeline: Timeline,
    factors: dict[str, Stored],
    scores: dict[str, Any] | None = None,
) -> Entry:
    shape = (3, 4) if module != "conv_in" else (2, 2, 3, 3)
    nothing = {"k": None, "ratio": None, "content": None, "style": None}
    return Entry(
        component, module, "weight", shape, fate, timeline, factors, {"klora": scores or nothing}
    )


def _row(content: float, style: float) -> Timeline:
    return Timeline.constant({"content": content, "style": style})


def _pair(
    out: int,
    width: int,
    *,
    rank: int,
    first: float,
    kernel: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Down and up that count upwards from ``first`` in quarters: exact in every dtype."""
    down_shape, up_shape = (rank, width, *kernel), (out, rank, *(1 for _ in kernel))
    down = first + torch.arange(torch.Size(down_shape).numel()) / 4
    up = first - torch.arange(torch.Size(up_shape).numel()) / 4
    return down.reshape(down_shape).to(dtype), up.reshape(up_shape).to(dtype)


if __name__ == "__main__":
    from support.lora_files import GOLDEN

    save_fusion(golden_fusion(), GOLDEN, overwrite=True)
