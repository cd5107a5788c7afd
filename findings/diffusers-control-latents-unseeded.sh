#!/usr/bin/env bash
# Versions:  diffusers 0.42.1, torch 2.13.0
# Guess:     a pipeline of diffusers that is called twice with a generator of one seed gives one result, as its
#            documentation of `generator` says; all that it draws comes from that generator.
# Behaviour: CogView4ControlPipeline encodes the control image by a sample of the decoder's distribution, and draws it
#            from torch's global generator. FluxControlPipeline, which does the same with the given one, is repeatable.
# Seen:      FluxControlPipeline: equal; CogView4ControlPipeline: unequal; the same after torch.manual_seed: equal
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
venv/bin/python - 2>/dev/null <<'PY'
import sys

import torch
from diffusers import (
    AutoencoderKL,
    CogView4ControlPipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxControlPipeline,
    FluxTransformer2DModel,
)

heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}


def vae():
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=16,
        shift_factor=0.0,
    )


torch.manual_seed(0)
cogview = CogView4ControlPipeline(
    tokenizer=None,
    text_encoder=None,
    vae=vae(),
    transformer=CogView4Transformer2DModel(
        **heads, in_channels=32, out_channels=16, text_embed_dim=16, time_embed_dim=16, condition_dim=8
    ),
    scheduler=FlowMatchEulerDiscreteScheduler(),
)
flux = FluxControlPipeline(
    tokenizer=None,
    text_encoder=None,
    tokenizer_2=None,
    text_encoder_2=None,
    vae=vae(),
    transformer=FluxTransformer2DModel(
        **heads,
        in_channels=128,
        out_channels=64,
        num_single_layers=1,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 2, 2),
    ),
    scheduler=FlowMatchEulerDiscreteScheduler(),
)
prompt = torch.randn(1, 6, 16)
given = {
    flux: {"pooled_prompt_embeds": torch.randn(1, 8)},
    cogview: {"negative_prompt_embeds": torch.randn(1, 6, 16)},
}


def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=prompt,
        control_image=torch.ones(1, 3, 64, 64) / 2,
        height=64,
        width=64,
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(1),
        **given[pipe],
    )[0]


def repeats(pipe, seed=None):
    results = []
    for _ in range(2):
        if seed is not None:
            torch.manual_seed(seed)
        results.append(sample(pipe))
    return "equal" if torch.equal(*results) else "unequal"


seen = (repeats(flux), repeats(cogview), repeats(cogview, 2))
print("FluxControlPipeline: %s; CogView4ControlPipeline: %s; the same after torch.manual_seed: %s" % seen)
sys.exit(seen != ("equal", "unequal", "equal"))
PY
