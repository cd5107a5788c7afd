"""The README's code, in a copy of the base and the LoRAs of drawings.

python examples/quickstart.py
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

folder = Path(tempfile.mkdtemp()) / "try"
drawings = Path(__file__).parent / "drawings"
shutil.copytree(drawings / "loras" / "weights", folder)
shutil.copytree(drawings / "base" / "weights", folder / "base")
os.chdir(folder)

# README: begin
from diffusers import DiffusionPipeline  # noqa: E402

from klora_compile import compile_fusion  # noqa: E402
from klora_compile.rules import Klora  # noqa: E402
from klora_runtime import apply_fusion, save_fusion  # noqa: E402

fusion = compile_fusion("subject-penguin.safetensors", "style-ink.safetensors", Klora(bias=0.3))
save_fusion(fusion, "more-penguin.klora.safetensors")  # ship this one file

pipe = DiffusionPipeline.from_pretrained("base")
handle = apply_fusion(pipe, "more-penguin.klora.safetensors")
image = pipe("a penguin, ink style", num_inference_steps=20, guidance_scale=3).images[0]
handle.set(style=0.8)  # how strongly each LoRA acts
print(handle.report())
handle.remove()  # every weight back to the bit
# README: end
