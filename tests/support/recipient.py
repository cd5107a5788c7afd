"""What the recipient of an artifact does; prints a digest of the picture.

Run as ``python -I recipient.py NAME FOLDER``, with an artifact's name on the Hub and the folder of
a pipeline, where klora_runtime is installed and klora_compile is not.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys

import torch


def main(name: str, folder: str) -> None:
    from diffusers import DiffusionPipeline

    from klora_runtime import apply_fusion

    assert importlib.util.find_spec("klora_compile") is None
    torch.set_num_threads(1)  # as the tests do: another number may round differently
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    handle = apply_fusion(pipe, name)
    generator = torch.Generator().manual_seed(0)
    image = pipe("a fox in ink", num_inference_steps=2, generator=generator).images[0]
    handle.remove()
    assert all(torch.equal(value, before[key]) for key, value in pipe.unet.state_dict().items())
    print(hashlib.sha256(image.tobytes()).hexdigest())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
