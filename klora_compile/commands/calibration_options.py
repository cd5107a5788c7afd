"""The options of a calibration: the base model, and what it draws with each LoRA alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from klora_compile.commands.parameters import NumberOr, SlotText
from klora_compile.extras import missing_library
from klora_compile.rules.lookup import RULE_OF_A_MODEL

if TYPE_CHECKING:
    from klora_compile.calibrating.calibrate import OnPart
    from klora_compile.reading.adapter import Adapter
    from klora_compile.settings.config import Config
    from klora_runtime.artifact.fusion import Fusion

_SIZE = click.IntRange(1, 2**20)

#: Options of the pictures. Their names are those of the fields of ``OwnPictures`` behind
#: ``calibrate_``, since rules have a seed or steps of their own.
_PICTURES = (
    click.option(
        "--calibrate-prompt",
        "calibrate_prompts",
        type=SlotText("TEXT"),
        multiple=True,
        help="A prompt that shows one LoRA alone, such as content=a penguin or style=a house, ink "
        "style. Repeat it for the other, and for several each.  [default: the trigger words that "
        "the LoRA states]",
    ),
    click.option(
        "--calibrate-pictures",
        "calibrate_count",
        type=click.IntRange(1, 1000),
        help="Pictures per LoRA; several prompts take turns.  [default: 4]",
    ),
    click.option(
        "--calibrate-seed",
        "calibrate_seed",
        type=click.IntRange(0, 2**62),
        help="Seed of the first picture.  [default: 0]",
    ),
    click.option(
        "--calibrate-steps",
        "calibrate_steps",
        type=click.IntRange(1, 10_000),
        help="Steps of a picture.  [default: the pipeline's]",
    ),
    click.option(
        "--calibrate-guidance",
        "calibrate_guidance",
        type=NumberOr(),
        help="Guidance scale.  [default: the pipeline's]",
    ),
    click.option(
        "--calibrate-height",
        "calibrate_height",
        type=_SIZE,
        help="Pixels.  [default: the pipeline's]",
    ),
    click.option(
        "--calibrate-width",
        "calibrate_width",
        type=_SIZE,
        help="Pixels.  [default: the pipeline's]",
    ),
)
_NAMES = ("prompts", "count", "seed", "steps", "guidance", "height", "width")


@dataclass(frozen=True)
class Calibrating:
    """What the options ask for."""

    model: str
    pictures: Mapping[str, Any]
    """Fields of ``OwnPictures`` that were given."""
    trust_remote_code: bool

    def compiled(
        self,
        adapters: Mapping[str, Adapter],
        config: Config,
        output: Path,
        device: str,
        on_part: OnPart,
        **settings: Any,
    ) -> Fusion:
        """Load the base model, calibrate and compile.

        Args:
            output: the artifact to come; the state of the calibration is kept beside it.
            device: as the option ``--device``.
            on_part: called after each picture and each update.
            settings: further arguments of ``compile_calibrated``.
        """
        try:
            from klora_compile.calibrating.calibrate import compile_calibrated
            from klora_compile.calibrating.pictures import OwnPictures
            from klora_compile.sampling.pipeline import load_pipeline
        except ModuleNotFoundError as error:
            raise missing_library("klora compile --calibrate", error) from error
        own = OwnPictures(**self.pictures)
        components = {
            layer.component for each in adapters.values() for layer in each.layers.values()
        }
        pipe = load_pipeline(
            self.model,
            sorted(components),
            device=device,
            dtype="auto",
            trust_remote_code=self.trust_remote_code,
        )
        checkpoint = checkpoint_of(output)
        return compile_calibrated(
            pipe, adapters, config, own, checkpoint=checkpoint, on_part=on_part, **settings
        )


def checkpoint_of(output: Path) -> Path:
    """Return where the calibration for an artifact keeps its state."""
    return output.with_name(f"{output.name}.calibration")


def calibration_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options; the command gets them as ``calibrating``, None without ``--calibrate``."""

    @wraps(command)
    def with_calibration(calibrate: str | None, trust_remote_code: bool, **values: Any) -> None:
        stated = {name: values.pop(f"calibrate_{name}") for name in _NAMES}
        pictures = {name: value for name, value in stated.items() if value not in (None, ())}
        if calibrate is None and (pictures or trust_remote_code):
            raise click.UsageError(
                "--calibrate-... and --trust-remote-code need a base model; name it with "
                "--calibrate MODEL."
            )
        if "prompts" in pictures:
            pictures["prompts"] = _by_slot(pictures["prompts"])
        asked = None if calibrate is None else Calibrating(calibrate, pictures, trust_remote_code)
        command(calibrating=asked, **values)

    wrapped: Callable[..., None] = click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Run the Python files that MODEL itself brings, such as pipeline.py. Read them first.",
    )(with_calibration)
    for option in reversed(_PICTURES):
        wrapped = option(wrapped)
    return click.option(
        "--calibrate",
        metavar="MODEL",
        help="Let this base model draw a few pictures with each LoRA alone, and fit a rule to them "
        f"(by default {RULE_OF_A_MODEL}). MODEL is a diffusers folder, or OWNER/NAME of one on the "
        "Hub. The state is kept in OUTPUT.calibration until the artifact is written, so the same "
        "command goes on after a stop.",
    )(wrapped)


def _by_slot(prompts: tuple[tuple[str, str], ...]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for slot, text in prompts:
        found.setdefault(slot, []).append(text)
    return found
