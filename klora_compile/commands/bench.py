"""``klora bench``: what sampling with two LoRAs costs, each way beside the others."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

import click

from klora_compile.commands.parameters import Device
from klora_runtime.__about__ import install_command
from klora_runtime.errors import KloraError

#: Names of ``klora_compile.bench.models.MODELS`` and ``.contestants.KINDS``, which are not imported
#: for the help's sake.
MODELS = ("sd1", "sdxl", "flux", "sd1-small", "sdxl-small", "flux-small", "sd1-tiny", "flux-tiny")
ROWS = ("bare", "peft-active", "peft-fused", "peft-callback", "literal", "merge", "branch")

_NEEDED = ("diffusers", "transformers", "accelerate", "peft")


@click.command("bench")
@click.option(
    "--model",
    type=click.Choice(MODELS),
    help="Sizes of a real model, or reduced; the weights are random.  "
    "[default: sdxl on a GPU, else sdxl-small]",
)
@click.option("--device", type=Device(), default="auto", show_default=True, help="Where to sample.")
@click.option("--steps", type=click.IntRange(2, 1000), help="Steps.  [default: the model's]")
@click.option("--resolution", type=click.IntRange(16, 4096), help="Pixels.  [default: the model's]")
@click.option(
    "--rank",
    type=click.IntRange(1, 1024),
    default=16,
    show_default=True,
    help="Of both LoRAs in every layer.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    help="Images of each row, in turns.",
)
@click.option(
    "--row",
    "kinds",
    type=click.Choice(ROWS),
    multiple=True,
    help="Only this one beside bare; repeat it for more.  [default: all]",
)
@click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="Each row under torch.compile too, on a GPU with CUDA graphs.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def bench_command(
    model: str | None,
    device: str,
    steps: int | None,
    resolution: int | None,
    rank: int,
    rounds: int,
    kinds: tuple[str, ...],
    compiled: bool,
    as_json: bool,
) -> None:
    """Time the ways to sample with two LoRAs side by side.

    The bare model, PEFT, K-LoRA recomputed in every layer call, and klora make the same image in
    turns, with random weights and two random LoRAs. Nothing is downloaded.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise KloraError(
            f"klora bench needs {', '.join(missing)}, which is not installed. Run this in "
            f"klora's source folder: {install_command('bench')}"
        )

    from diffusers.utils import logging
    from tqdm import tqdm

    from klora_compile.bench.models import MODELS as CONFIGURATIONS
    from klora_compile.bench.models import default_model
    from klora_compile.bench.race import Race, run
    from klora_compile.bench.table import markdown_table
    from klora_runtime.devices.names import as_device

    logging.set_verbosity_error()  # PEFT's rows look for text encoders that are not there
    where = as_device(device)
    chosen = CONFIGURATIONS[model or default_model(where)]
    race = Race(
        model=chosen,
        device=where,
        steps=steps or chosen.steps,
        resolution=resolution or chosen.resolution,
        rank=rank,
        rounds=rounds,
        compiled=compiled,
        kinds=kinds or ROWS,
    )
    with tqdm(unit="part", disable=None, leave=False) as bar:

        def on_progress(what: str, total: int) -> None:
            bar.total = total
            bar.set_description(what)
            bar.update()

        result: Any = run(race, on_progress)
    click.echo(json.dumps(result.json()) if as_json else markdown_table(result))
