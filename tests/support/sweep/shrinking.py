"""Models of diffusers made tiny by a rule on the names of their settings.

A model that the rule does not fit has its own settings in :mod:`support.sweep.settings`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from support.sweep.settings import HIDDEN, OWN, POOLED, WIDTH
from torch import nn

#: Numbers that a tiny model may have.
MOST = 8_000_000

#: Setting -> what it is in a tiny model, where its class has it and gives it a default.
SMALL: Mapping[str, Any] = {
    **dict.fromkeys(
        ("num_layers", "n_layers", "depth", "num_layers_per_block", "num_visual_blocks"), 2
    ),
    **dict.fromkeys(
        (
            "num_single_layers",
            "num_refiner_layers",
            "n_refiner_layers",
            "num_mmdit_layers",
            "mmdit_layers",
            "num_single_dit_layers",
            "num_text_blocks",
            "num_key_value_heads",
            "num_kv_heads",
            "layers_per_block",
        ),
        1,
    ),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "n_kv_heads"), 2),
    **dict.fromkeys(
        (
            "joint_attention_dim",
            "cross_attention_dim",
            "caption_channels",
            "text_embed_dim",
            "text_embed_dim_2",
            "text_dim",
            "text_states_dim",
            "cap_feat_dim",
            "in_text_dim",
            "text_hidden_dim",
            "llm_features_dim",
            "text_in_dim",
        ),
        WIDTH,
    ),
    **dict.fromkeys(("pooled_projection_dim", "in_text_dim2", "time_dim", "freq_dim"), POOLED),
    **dict.fromkeys(
        (
            "hidden_size",
            "dim",
            "model_dim",
            "inner_dim",
            "caption_projection_dim",
            "time_embed_dim",
            "timestep_embed_dim",
            "context_in_dim",
        ),
        HIDDEN,
    ),
    **dict.fromkeys(("ffn_dim", "ff_dim", "intermediate_size"), 32),
    **dict.fromkeys(("attention_head_dim", "sample_size", "timestep_guidance_channels"), 8),
    "pos_embed_max_size": 64,
    "rope_dim_list": (4, 2, 2),
    "rope_axes_dim": (4, 2, 2),
    "axes_dim_rope": (4, 2, 2),
    "multiple_of": 8,
    "norm_num_groups": 4,
}

#: Setting -> what each of its values is in a tiny model, where its class has a default for it.
EACH: Mapping[str, Any] = {
    **dict.fromkeys(
        (
            *("block_out_channels", "encoder_block_out_channels", "decoder_block_out_channels"),
            "decode_block_out_channels",
        ),
        8,
    ),
    **dict.fromkeys(
        ("layers_per_block", "decoder_layers_per_block", "encoder_layers_per_block", "dim_mult"), 1
    ),
}

#: Widths of a head's part for each axis, by the number of axes; together one head.
AXES = {2: (4, 4), 3: (4, 2, 2), 4: (2, 2, 2, 2)}


def tiny(kind: type[nn.Module], **settings: Any) -> Any:
    """A model of this class, always with the same weights.

    Raises:
        TypeError: it would not be tiny.
    """
    given = {**_by_rule(kind), **OWN.get(kind.__name__, {}), **settings}
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(**given).parameters())
    if size > MOST:
        raise TypeError(f"no tiny settings of {kind.__name__} are known")
    with torch.random.fork_rng(), unset_memory_is_nan():
        torch.manual_seed(0)
        model = kind(**given)
        for parameter in model.parameters():
            zero = parameter.dim() > 1 and not parameter.any()  # training begins there
            if zero or not parameter.isfinite().all():
                nn.init.normal_(parameter, std=0.05)
    return model.eval().requires_grad_(False)


@contextmanager
def unset_memory_is_nan() -> Iterator[None]:
    """Make it seen which parameters a class leaves to what loads them."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _by_rule(kind: type[nn.Module]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        default = parameter.default
        if name in ("axes_dims_rope", "axes_dims"):
            given[name] = type(default)(AXES[len(default)])
        elif name in EACH and isinstance(default, list | tuple):
            given[name] = type(default)([EACH[name]] * len(default))
        elif name in SMALL and default is not None and default is not parameter.empty:
            given[name] = SMALL[name]
    return given
