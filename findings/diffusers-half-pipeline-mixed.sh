#!/usr/bin/env bash
# Versions:  diffusers 0.42.1, transformers 5.23.0, torch 2.13.0
# Guess:     a pipeline that was saved in float16 is loaded in one dtype, whichever it is, and draws.
# Behaviour: diffusers loads its own parts in float32, and transformers loads the text encoder in the dtype that its
#            configuration names, float16. Nothing warns. The first call then fails: the text encoder's states are
#            float16, and the weights of the denoiser that they meet are float32.
# Seen:      unet float32, vae float32, text_encoder float16; drawing: RuntimeError, unlike dtypes; the same folder with
#            torch_dtype=torch.float32: draws
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
venv/bin/python - 2>/dev/null <<'PY'
import json
import sys

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

words = {word: index for index, word in enumerate(["a</w>", "fox</w>", "<|startoftext|>", "<|endoftext|>"])}
with open("vocab.json", "w") as file:
    json.dump(words, file)
with open("merges.txt", "w") as file:
    file.write("#version: 0.2\n")
blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4}
torch.manual_seed(0)
StableDiffusionPipeline(
    vae=AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **blocks
    ),
    text_encoder=CLIPTextModel(
        CLIPTextConfig(
            vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            max_position_embeddings=8, bos_token_id=2, eos_token_id=3, pad_token_id=3,
        )
    ),
    tokenizer=CLIPTokenizer("vocab.json", "merges.txt", model_max_length=8),
    unet=UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, cross_attention_dim=8, attention_head_dim=4, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2, **blocks,
    ),
    scheduler=DDIMScheduler(),
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
).to(torch.float16).save_pretrained("half")


def draws(pipe):
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe("a fox", num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="latent")
    except RuntimeError as error:
        return "RuntimeError, unlike dtypes" if "dtype" in str(error) else str(error)
    return "draws"


plain = DiffusionPipeline.from_pretrained("half")
parts = [(name, str(getattr(plain, name).dtype).split(".")[1]) for name in ("unet", "vae", "text_encoder")]
given = DiffusionPipeline.from_pretrained("half", torch_dtype=torch.float32)
seen = (", ".join("%s %s" % part for part in parts), draws(plain), draws(given))
print("%s; drawing: %s; the same folder with torch_dtype=torch.float32: %s" % seen)
expected = (
    "unet float32, vae float32, text_encoder float16", "RuntimeError, unlike dtypes", "draws",
)
sys.exit(seen != expected)
PY
