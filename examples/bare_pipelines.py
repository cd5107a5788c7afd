"""Pipelines of diffusers with a denoiser and little else.

They take embeddings instead of prompts and return latents, so they need no text encoder and no
decoder.
"""

from __future__ import annotations

from typing import Any

import torch


def bare_pipeline(pipeline: Any, text_encoders: int = 1, **parts: Any) -> Any:
    """Return a pipeline without the parts that are not named.

    Args:
        pipeline: the pipeline's class.
        text_encoders: number of text encoders of the class; all of them are left out.
        parts: the denoiser, the scheduler and other needed parts.
    """
    return pipeline(**{"vae": None, **no_text_encoders(text_encoders), **parts})


def no_text_encoders(count: int = 1) -> dict[str, None]:
    """Return arguments that leave out a pipeline's text encoders and tokenizers."""
    suffixes = ("", "_2", "_3")[:count]
    return {f"{part}{end}": None for part in ("text_encoder", "tokenizer") for end in suffixes}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return random numbers for an embedding or a latent; equal seeds give equal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
