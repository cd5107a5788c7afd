"""The README's code, on a tiny pipeline so that it runs anywhere.

python examples/quickstart.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tiny_pipeline import tiny_lora, tiny_pipeline

pipe = tiny_pipeline("sd1")  # yours: DiffusionPipeline.from_pretrained(...)
folder = Path(tempfile.mkdtemp())
tiny_lora(pipe, folder / "fox.safetensors", seed=1)
tiny_lora(pipe, folder / "ink.safetensors", seed=2)

# README: begin
from klora_compile import compile_fusion  # noqa: E402
from klora_compile.rules import Klora  # noqa: E402
from klora_runtime import apply_fusion, save_fusion  # noqa: E402

fusion = compile_fusion(folder / "fox.safetensors", folder / "ink.safetensors", Klora(pattern="s"))
save_fusion(fusion, folder / "fox-in-ink.klora.safetensors")  # ship this one file

handle = apply_fusion(pipe, folder / "fox-in-ink.klora.safetensors")
image = pipe("a fox in ink", num_inference_steps=20).images[0]  # any prompt, any steps
handle.set(style=0.8)  # how strongly each LoRA acts
print(handle.report())
handle.remove()  # every weight back to the bit
# README: end
