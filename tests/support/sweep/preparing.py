"""What is done to a built pipeline before it is called, so that a call is cheap and can be made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from diffusers import DiffusionPipeline
from support.sweep.inputs import PIXELS, STEPS, picture


def _inverted(pipe: Any) -> None:
    """Let a pipeline that edits a picture find the noise of it first."""
    pipe.invert(image=picture(32), num_inversion_steps=STEPS, skip=0.0)


def _few_pixels_of_an_edit(pipe: Any) -> None:
    processor = getattr(pipe, "vae_image_processor", None) or pipe.image_processor
    processor.get_default_height_width = lambda *_, **__: (PIXELS, PIXELS)


#: Pipeline -> what is done to it.
PREPARED: Mapping[str, Callable[[Any], None]] = {
    "HunyuanVideo15ImageToVideoPipeline": lambda pipe: setattr(pipe, "target_size", PIXELS),
    "JoyImageEditPipeline": _few_pixels_of_an_edit,
    "JoyImageEditPlusPipeline": _few_pixels_of_an_edit,
    "Kandinsky5I2IPipeline": lambda pipe: setattr(pipe, "resolutions", [(PIXELS, PIXELS)]),
    "Kandinsky6SRPipeline": lambda pipe: setattr(pipe, "transformer_tile_sizes", [(128, 128)]),
    "LEditsPPPipelineStableDiffusion": _inverted,
    "LEditsPPPipelineStableDiffusionXL": _inverted,
}


@contextmanager
def few_pixels(kind: type[DiffusionPipeline]) -> Iterator[None]:
    """Let a pipeline that prescribes pictures of a million pixels prescribe tiny ones."""
    module: Any = sys.modules[kind.__module__]
    with ExitStack() as stack:
        if calculate := getattr(module, "calculate_dimensions", None):
            stack.enter_context(
                patch.object(
                    module, "calculate_dimensions", lambda _, ratio: calculate(PIXELS**2, ratio)
                )
            )
        yield
