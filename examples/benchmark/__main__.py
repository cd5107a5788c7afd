"""``python -m benchmark PART``, with `examples` and `tests` on the path: see ``make bench``."""

from __future__ import annotations

import json
from typing import Any

import click
from diffusers.utils import logging
from tqdm import tqdm

from benchmark import attach, catalogue, measuring, reading, size, swapping, sweeping
from benchmark.before import command as before
from benchmark.contestants import KINDS
from benchmark.models import MODELS, default_model
from benchmark.published import published_command
from benchmark.race import Race, run
from benchmark.table import race_table
from klora_runtime.devices.names import as_device
from klora_runtime.errors import KloraError


class _Parts(click.Group):
    """A command group that prints klora's errors as one message."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KloraError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Parts)
def main() -> None:
    """Measure klora. Weights are random, and nothing is downloaded."""


@main.command("race")
@click.option(
    "--model",
    type=click.Choice(list(MODELS)),
    help="Sizes of a real model, or reduced.  [default: sdxl on a GPU, else sdxl-small]",
)
@click.option("--device", default="cpu", show_default=True, help="Where to sample.")
@click.option("--steps", type=click.IntRange(2, 1000), help="Steps.  [default: the model's]")
@click.option("--resolution", type=click.IntRange(16, 4096), help="Pixels.  [default: the model's]")
@click.option(
    "--rank",
    type=click.IntRange(1, 1024),
    default=16,
    show_default=True,
    help="Rank of both LoRAs in every layer.",
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
    type=click.Choice(list(KINDS)),
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
def race_command(
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
    turns.
    """
    logging.set_verbosity_error()  # PEFT's rows look for text encoders that are not there
    where = as_device(device)
    chosen = MODELS[model or default_model(where)]
    race = Race(
        model=chosen,
        device=where,
        steps=steps or chosen.steps,
        resolution=resolution or chosen.resolution,
        rank=rank,
        rounds=rounds,
        compiled=compiled,
        kinds=kinds or tuple(KINDS),
    )
    with tqdm(unit="part", disable=None, leave=False) as bar:

        def on_progress(what: str, total: int) -> None:
            bar.total = total
            bar.set_description(what)
            bar.update()

        result = run(race, on_progress)
    click.echo(json.dumps(result.json()) if as_json else race_table(result))


main.add_command(attach.main, "attach")
main.add_command(catalogue.main, "catalogue")
main.add_command(before.main, "before")
main.add_command(measuring.main, "measuring")
main.add_command(reading.main, "reading")
main.add_command(size.main, "size")
main.add_command(swapping.main, "swapping")
main.add_command(sweeping.main, "sweeping")
main.add_command(published_command, "published")

if __name__ == "__main__":
    main(prog_name="python -m benchmark")
