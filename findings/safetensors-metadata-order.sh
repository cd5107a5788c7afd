#!/usr/bin/env bash
# Versions:  safetensors 0.8.0, numpy 2.4.6
# Guess:     saving equal tensors with equal metadata gives equal bytes, as the format needs no order.
# Behaviour: with several metadata keys the bytes differ from process to process. The keys are written in the order
#            of a hash map with a random seed. With one key the bytes are equal.
# Seen:      1 key: 1 distinct file of 12; 4 keys: 10 to 12 distinct files of 12
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cd "$folder"
cat > save.py <<'PY'
import hashlib
import sys

import numpy as np
from safetensors.numpy import save

metadata = {f"key{i}": str(i) for i in range(int(sys.argv[1]))}
print(hashlib.sha256(save({"a": np.zeros(2, np.float32)}, metadata)).hexdigest())
PY
distinct() { for _ in $(seq 12); do venv/bin/python save.py "$1"; done | sort -u | wc -l; }
one=$(distinct 1) four=$(distinct 4)
echo "1 key: $one distinct file(s) of 12; 4 keys: $four distinct files of 12"
[ "$one" -eq 1 ] && [ "$four" -gt 1 ]
