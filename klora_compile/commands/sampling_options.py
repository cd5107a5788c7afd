"""Options of commands that make pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

from klora_compile.commands.parameters import Device

_Command = TypeVar("_Command", bound=Callable[..., None])

#: ``klora_runtime.layers.choice.MODES``, repeated here so that the help does not import torch.
MODES = ("auto", "merge", "branch")
#: The same of ``klora_runtime.pipeline.attachment.MISSING``.
MISSING = ("error", "skip")

model_option = click.option(
    "--model",
    "--pretrained-model-name-or-path",
    "model",
    required=True,
    metavar="DIR",
    help="A diffusers folder (pipe.save_pretrained wrote it), or OWNER/NAME of one on the Hub.",
)

_OPTIONS = (
    click.option(
        "--scheduler",
        metavar="NAME",
        help="A scheduler of diffusers, such as DDIM or EulerDiscrete, with the settings of the "
        "model's own.",
    ),
    click.option(
        "--mode",
        type=click.Choice(MODES),
        default="auto",
        show_default=True,
        help="How the fusion acts on the model.",
    ),
    click.option(
        "--missing",
        type=click.Choice(MISSING),
        default="error",
        show_default=True,
        help="Layers of the fusion that the model lacks: refuse it, or skip them and say how many.",
    ),
    click.option(
        "--device",
        type=Device(),
        default="auto",
        show_default=True,
        help="Where to sample. auto takes a GPU if there is one.",
    ),
    click.option(
        "--dtype",
        "--torch-dtype",
        "dtype",
        type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
        default="auto",
        show_default=True,
        help="Type of the weights. auto is float32 on a CPU, and on a GPU the type of the "
        "denoiser's files.",
    ),
    click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Run the Python files that the model itself brings, such as pipeline.py. Read them "
        "first.",
    ),
)


def sampling_options(command: _Command) -> _Command:
    """Add the options that say how a model samples."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


metadata_option = click.option(
    "--no-metadata",
    is_flag=True,
    help="Do not write into a .png how it was made: prompt, seed, settings, digests of the LoRAs.",
)
