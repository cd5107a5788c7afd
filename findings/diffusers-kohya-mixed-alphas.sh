#!/usr/bin/env bash
# Versions:  diffusers 0.42.1, peft 0.21.2, torch 2.13.0
# Guess:     diffusers gives each layer of a Stable Diffusion LoRA in the keys of kohya its own alpha / rank.
# Behaviour: where a file has several alphas, those of cross attention are lost: its layers get the alpha of another
#            layer. Loading succeeds. PEFT warns that alpha_pattern keys match no module; the names there are those of
#            old attention processors.
# Seen:      attn1: 0 of 16 layers have a wrong scale; attn2: 16 of 16; ff: 0 of 8
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
venv/bin/python - 2>/dev/null <<'PY'
import sys
from collections import Counter

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

RANK = 4
ALPHAS = {"attn1": 1.0, "attn2": 2.0, "ff": 4.0}
unet = UNet2DConditionModel(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=32,
    attention_head_dim=8,
    layers_per_block=1,
    norm_num_groups=8,
)
names = {
    name: kind
    for name, module in unet.named_modules()
    for kind in ALPHAS
    if isinstance(module, torch.nn.Linear) and f".{kind}." in name
}
file = {}
for name, kind in names.items():
    layer, key = unet.get_submodule(name), "lora_unet_" + name.replace(".", "_")
    file[f"{key}.lora_down.weight"] = torch.randn(RANK, layer.in_features)
    file[f"{key}.lora_up.weight"] = torch.randn(layer.out_features, RANK)
    file[f"{key}.alpha"] = torch.tensor(ALPHAS[kind])
state, alphas = Loader.lora_state_dict(file, unet_config=unet.config)[:2]
Loader.load_lora_into_unet(state, alphas, unet, adapter_name="lora")
wrong, total = Counter(), Counter(names.values())
for name, kind in names.items():
    wrong[kind] += unet.get_submodule(name).scaling["lora"] != ALPHAS[kind] / RANK
parts = [f"{kind}: {wrong[kind]} of {total[kind]}" for kind in ALPHAS]
print(f"{parts[0]} layers have a wrong scale; {parts[1]}; {parts[2]}")
sys.exit(0 if wrong["attn2"] == total["attn2"] and not wrong["attn1"] + wrong["ff"] else 1)
PY
