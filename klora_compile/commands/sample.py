"""``klora sample``: make pictures with an artifact and a diffusers folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from klora_compile.commands.again import again_option
from klora_compile.commands.beside import Beside, BesideArtifact, by_name
from klora_compile.commands.names import artifact_argument
from klora_compile.commands.output import check_output
from klora_compile.commands.parameters import (
    NumberOr,
    Weight,
    signed_by_option,
    source_option,
)
from klora_compile.commands.result import json_option, print_result
from klora_compile.commands.sampling_options import (
    metadata_option,
    model_option,
    sampling_options,
)
from klora_compile.extras import missing_library

if TYPE_CHECKING:
    from klora_compile.sampling.making import Making

#: Argument of a pipeline's call -> parameter of this command.
_CALL = {
    "negative_prompt": "negative_prompt",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "height": "height",
    "width": "width",
}

_LAST_SEED = 2**63 - 1
_SIZE = click.IntRange(1, 2**20)


@click.command("sample")
@artifact_argument
@again_option
@model_option
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    required=True,
    help="What to show. Repeat it for a contact sheet with a row for each.",
)
@click.option("--negative-prompt", help="What not to show.")
@click.option(
    "--steps",
    "--num-inference-steps",
    "steps",
    type=click.IntRange(1, 10_000),
    help="Steps.  [default: the pipeline's]",
)
@click.option(
    "--seed",
    type=click.IntRange(0, _LAST_SEED),
    default=0,
    show_default=True,
    help="Seed of the first picture of each prompt; the next ones count up.",
)
@click.option(
    "--count",
    "--num-images-per-prompt",
    "count",
    type=click.IntRange(1, 10_000),
    default=1,
    show_default=True,
    help="Pictures for each prompt, a column for each.",
)
@click.option(
    "--guidance",
    "--guidance-scale",
    "guidance",
    type=NumberOr(),
    help="Guidance scale.  [default: the pipeline's]",
)
@click.option("--height", type=_SIZE, help="Pixels.  [default: the pipeline's]")
@click.option("--width", type=_SIZE, help="Pixels.  [default: the pipeline's]")
@sampling_options
@click.option(
    "--weight",
    "weights",
    type=Weight(),
    multiple=True,
    help="How strongly a slot acts, such as style=0.8. Repeat it for the other.",
)
@click.option(
    "--always",
    type=BesideArtifact(),
    multiple=True,
    help="An artifact of one LoRA that acts beside FILE in all its layers at every step, such as "
    "turbo=turbo.klora.safetensors:0.8. Repeat it for several.",
)
@click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="torch.compile the denoiser: a slow first picture, then faster ones.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The picture to write: .png, .jpg, .webp; for one video also .gif.",
)
@metadata_option
@source_option
@signed_by_option
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@json_option
def sample_command(
    file: Path,
    model: str,
    prompts: tuple[str, ...],
    seed: int,
    count: int,
    scheduler: str | None,
    mode: str,
    weights: tuple[tuple[str, float], ...],
    always: tuple[Beside, ...],
    missing: Literal["error", "skip"],
    compiled: bool,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    no_metadata: bool,
    again: Making | None,
    output: Path,
    sources: tuple[tuple[str, Path], ...],
    signed_by: Path | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Make pictures with the artifact FILE.

    One prompt makes one picture; several prompts or a count make a contact sheet, a row for each
    prompt and a column for each seed. A picture depends on its prompt and seed alone. A .png says
    how it was made, in the words of A1111 too; 'klora inspect' shows it, --again repeats it.
    """
    if seed > _LAST_SEED - count:
        raise click.UsageError(f"--seed {seed} and --count {count} go past {_LAST_SEED}.")
    _, of_beside = by_name(always, weights)
    beside = {each.name: each.files[0] for each in always}
    inputs = (file, *(path for _, path in sources), *map(Path, beside.values()))
    check_output(output, force, inputs=inputs)

    try:
        from klora_compile.sampling.pictures import Request
        from klora_compile.sampling.run import How, sample_to_file
    except ModuleNotFoundError as error:
        raise missing_library("klora sample", error) from error
    settings = {name: options[option] for name, option in _CALL.items()}
    request = Request(prompts, seed, count, settings)
    how = How(
        scheduler=scheduler,
        mode=mode,
        weights=dict(weights) | of_beside,
        compiled=compiled,
        device=device,
        dtype=dtype,
        sources=dict(sources),
        always=beside,
        missing=missing,
        signed_by=signed_by,
        trust_remote_code=trust_remote_code,
        tells=not no_metadata,
        again=again,
        overwrite=force,
    )
    made = sample_to_file(file, model, request, output, how)
    print_result(as_json, "pictures", made.json, made.text)
