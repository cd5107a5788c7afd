#!/usr/bin/env bash
# Versions:  peft 0.21.2, torch 2.13.0
# Guess:     WaveFT works with every wavelet that its config accepts, and a layer's delta has the shape of its weight.
# Behaviour: with coif5 the model is made without a word, and the delta of a layer of 64 x 64 is 9 x 9, so that the layer
#            cannot be merged: PEFT's table of coif5 has 48 coefficients, where that wavelet has 30. Of the 74 names that
#            the config accepts, 50 are of wavelets that PEFT does not have; they fail later.
# Seen:      23 of 74 wavelets give [64, 64]; coif5 gives [9, 9]; 50 have no table; merging coif5 raises RuntimeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
venv/bin/python - 2>/dev/null <<'PY'
import sys

import torch
from peft import WaveFTConfig, get_peft_model
from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
from peft.tuners.waveft.wavelet import wavelist


def adapted(wavelet):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    config = WaveFTConfig(target_modules=["0"], n_frequency=100, wavelet_family=wavelet)
    return get_peft_model(model, config)


accepted = list(WAVELET_REDUCTIONS)
known = [wavelet for wavelet in accepted if wavelet in wavelist()]
shapes = {w: list(adapted(w).base_model.model[0].get_delta_weight("default").shape) for w in known}
right = [wavelet for wavelet, shape in shapes.items() if shape == [64, 64]]
try:
    adapted("coif5").merge_and_unload()
    merging = "works"
except RuntimeError:
    merging = "raises RuntimeError"
print(
    f"{len(right)} of {len(accepted)} wavelets give [64, 64]; coif5 gives {shapes['coif5']}; "
    f"{len(accepted) - len(known)} have no table; merging coif5 {merging}"
)
sys.exit(0 if shapes["coif5"] == [9, 9] and merging != "works" else 1)
PY
