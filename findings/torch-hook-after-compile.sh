#!/usr/bin/env bash
# Version:   torch 2.13.0 (CPU)
# Guess:     torch.compile guards on the hooks of a module. A forward hook that is registered after the first call
#            makes it compile again, and acts; or registering it raises.
# Behaviour: the hook is ignored without a word, and nothing is compiled anew. The plain module runs it.
# Seen:      compiled: off by 0, 0 recompiles; plain module: off by 100
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
venv/bin/python - 2>/dev/null <<'PY'
import sys

import torch

compilations = []


def backend(graph, example_inputs):
    compilations.append(graph)
    return graph.forward


module = torch.nn.Linear(4, 4)
compiled = torch.compile(module, backend=backend)
x = torch.randn(2, 4)
before = compiled(x)
first = len(compilations)
module.register_forward_hook(lambda module, args, output: output + 100)
through_compiled = float((compiled(x) - before).abs().max())
through_module = float((module(x) - before).abs().max())
again = len(compilations) - first
print(f"compiled: off by {through_compiled:.0f}, {again} recompiles; plain module: off by {through_module:.0f}")
sys.exit(0 if through_compiled < 1 and again == 0 and through_module > 99 else 1)
PY
