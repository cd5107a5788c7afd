#!/usr/bin/env bash
# Version:   torch 2.13.0 (CPU)
# Guess:     both float8 dtypes treat what is too large alike; infinity stays infinity where the dtype has it, and
#            becomes NaN in float8_e4m3fn, which has none. A check for infinity after the cast finds an overflow.
# Behaviour: float8_e4m3fn saturates, infinity too: 448 comes out, a plain number, so that an overflow of the source
#            cannot be seen any more. float8_e5m2 overflows to infinity. NaN stays NaN in both.
# Seen:      float8_e4m3fn: [448.0, 448.0, nan]; float8_e5m2: [inf, inf, nan]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PY'
import math
import sys

import torch

values = torch.tensor([1e6, math.inf, math.nan])
seen = {d: values.to(d).float().tolist() for d in (torch.float8_e4m3fn, torch.float8_e5m2)}
print("; ".join(f"{str(dtype)[6:]}: {found}" for dtype, found in seen.items()))
four, five = seen.values()
same = four[:2] == [448.0, 448.0] and five[:2] == [math.inf, math.inf]
sys.exit(0 if same and math.isnan(four[2]) and math.isnan(five[2]) else 1)
PY
