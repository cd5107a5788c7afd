"""Pipelines of diffusers that hold a denoiser and little else.

They take embeddings instead of prompts and give latents, so that no text encoder and no decoder
has to be made.
"""

from __future__ import annotations

from typing import Any

import torch


def bare_pipeline(pipeline: Any, text_encoders: int = 1, **parts: Any) -> Any:
    """A pipeline without the parts that are not named.

    Args:
        pipeline: its class.
        text_encoders: how many it would have; it gets none.
        parts: the denoiser, the scheduler and whatever else it needs.
    """
    return pipeline(**{"vae": None, **no_text_encoders(text_encoders), **parts})


def no_text_encoders(count: int = 1) -> dict[str, None]:
    """That a pipeline has none of its text encoders and tokenizers."""
    suffixes = ("", "_2", "_3")[:count]
    return {f"{part}{end}": None for part in ("text_encoder", "tokenizer") for end in suffixes}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers that stand for an embedding or a latent, always the same for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
