#!/usr/bin/env bash
# Versions:  diffusers 0.42.1, torch 2.13.0
# Guess:     from_single_file reads a file in the names of FLUX's authors for the model that `config` describes, whatever
#            its width: the sizes of a fused projection's parts follow from its own weight.
# Behaviour: the conversion has the width 3072 of the released model written in. A model of another width, which
#            FluxTransformer2DModel makes and save_pretrained keeps, raises.
# Seen:      width 3072: loaded; width 64: RuntimeError: split_with_sizes expects split_sizes to sum exactly to 448
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
venv/bin/python - 2>/dev/null <<'PY'
import json
import sys
from functools import partial
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

HEAD, TEXT, POOLED = 16, 48, 32
half = partial(torch.zeros, dtype=torch.float16)


def checkpoint(width):
    """One block of each kind, in the names of the model's authors."""
    sizes = {"txt_in": (width, TEXT), "img_in": (width, 64), "final_layer.linear": (64, width)}
    sizes["final_layer.adaLN_modulation.1"] = (2 * width, width)
    for part, inner in (("time_in", 256), ("vector_in", POOLED)):
        sizes |= {part + ".in_layer": (width, inner), part + ".out_layer": (width, width)}
    for stream in ("img", "txt"):
        block = "double_blocks.0." + stream
        sizes |= {
            block + "_mod.lin": (6 * width, width),
            block + "_attn.qkv": (3 * width, width),
            block + "_attn.proj": (width, width),
            block + "_mlp.0": (4 * width, width),
            block + "_mlp.2": (width, 4 * width),
        }
    block = "single_blocks.0."
    sizes |= {
        block + "modulation.lin": (3 * width, width),
        block + "linear1": (7 * width, width),
        block + "linear2": (width, 5 * width),
    }
    found = {}
    for name, (rows, columns) in sizes.items():
        found |= {name + ".weight": half(rows, columns), name + ".bias": half(rows)}
    norms = ["double_blocks.0.img_attn.norm", "double_blocks.0.txt_attn.norm", "single_blocks.0.norm"]
    for norm in norms:
        for side in ("query", "key"):
            found["%s.%s_norm.scale" % (norm, side)] = torch.ones(HEAD)
    return found


def read(width):
    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=HEAD,
        num_attention_heads=width // HEAD,
        joint_attention_dim=TEXT,
        pooled_projection_dim=POOLED,
        axes_dims_rope=(4, 4, 8),
    )
    folder = Path("model-%d" % width)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(model.config)))
    file = folder / "flux.safetensors"
    save_file(checkpoint(width), file)
    try:
        FluxTransformer2DModel.from_single_file(str(file), config=str(folder))
        return "loaded"
    except Exception as error:
        return "%s: %s" % (type(error).__name__, str(error).partition(" (")[0])


seen = read(3072), read(64)
print("width 3072: %s; width 64: %s" % seen)
sys.exit(seen != ("loaded", "RuntimeError: split_with_sizes expects split_sizes to sum exactly to 448"))
PY
