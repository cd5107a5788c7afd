"""Option types that click does not have."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from klora_compile.settings.read_options import ReadOptions
from klora_runtime.devices.device_types import SPELLINGS

ARTIFACT = click.Path(exists=True, dir_okay=False, path_type=Path)
LORA = click.Path(exists=True, path_type=Path)


#: ``-o``, of commands that write an artifact.
artifact_output = click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The artifact to write, by custom NAME.klora.safetensors.",
)

_LARGEST = 1e15

_BASE = click.option(
    "--base",
    type=click.Path(exists=True, path_type=Path),
    help="The base model, whose weights DoRA needs: a folder of diffusers or a safetensors file.",
)
_READING = (
    _BASE,
    click.option(
        "--ignore-unknown",
        is_flag=True,
        help="Leave out keys that klora cannot use, and record them.",
    ),
    click.option(
        "--max-error",
        type=click.FloatRange(0.0, 0.5),
        default=1e-6,
        show_default=True,
        help="Share of a delta that may be lost where its form is not low rank (LoKr, DoRA, full "
        "differences): more makes smaller artifacts.",
    ),
    click.option(
        "--alpha-conflict",
        type=click.Choice(["error", "first"]),
        default="error",
        show_default=True,
        help="Where two sources state different alphas: refuse, or take the first by rule.",
    ),
    click.option(
        "--denoiser",
        type=click.Choice(["transformer_2"]),
        help="The LoRAs are for this component, which their files do not say: Wan 2.2's second "
        "transformer (low noise). Apply its artifact beside that of the first.",
    ),
)

_Command = TypeVar("_Command", bound=Callable[..., Any])


def base_option(command: _Command) -> _Command:
    """``--base``."""
    return _BASE(command)


def reading_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of reading LoRAs; the command gets them as one ``reading``."""

    @wraps(command)
    def with_reading(**values: Any) -> None:
        own = {field.name: values.pop(field.name) for field in fields(ReadOptions)}
        command(reading=ReadOptions(**own), **values)

    wrapped: Callable[..., None] = with_reading
    for option in reversed(_READING):
        wrapped = option(wrapped)
    return wrapped


class NumberOr(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """One of some words, or a number.

    Args:
        words: the words.
        whole: whether the number must be whole and at least 1.
    """

    def __init__(self, *words: str, whole: bool = False) -> None:
        self.words = words
        self.whole = whole
        self.name = "|".join((*words, "N" if whole else "NUMBER"))

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | float | int:
        if value in self.words:
            return str(value)
        number: float | int
        try:
            number = int(str(value)) if self.whole else float(str(value))
        except ValueError:
            self.fail(f"{value!r} is not {self.name}.", param, ctx)
        if not abs(number) < _LARGEST or (self.whole and number < 1):
            self.fail(f"{value!r} is out of range for {self.name}.", param, ctx)
        return number

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name


class Device(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """A device that klora knows; whether the machine has it is seen when it is used."""

    name = "|".join(SPELLINGS)
    _pattern = "|".join(spelling.replace("[:N]", r"(:\d{1,3})?") for spelling in SPELLINGS)

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        text = str(value)
        if not re.fullmatch(self._pattern, text):
            self.fail(f"{text!r} is not {self.name}.", param, ctx)
        return text

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name


class Weight(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """``SLOT=FACTOR``, such as ``style=0.8``."""

    name = "SLOT=FACTOR"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        slot, sign, factor = str(value).partition("=")
        if not slot or not sign:
            self.fail(f"{value!r} is not {self.name}.", param, ctx)
        return slot, float(NumberOr().convert(factor, param, ctx))

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name


class SlotText(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """``SLOT=`` and some text.

    Args:
        what: the name of the text.
    """

    def __init__(self, what: str) -> None:
        self.name = f"SLOT={what}"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        slot, sign, text = str(value).partition("=")
        if not slot or not sign:
            self.fail(f"{value!r} is not {self.name}.", param, ctx)
        return slot, text

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name


class SourceFile(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """``NAME=PATH`` of a file that is there, such as ``content=fox.safetensors``."""

    name = "NAME=PATH"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Path]:
        if isinstance(value, tuple):
            return value
        source, sign, path = str(value).partition("=")
        if not source or not sign:
            self.fail(f"{value!r} is not {self.name}.", param, ctx)
        found: Path = click.Path(exists=True, dir_okay=False, path_type=Path).convert(
            path, param, ctx
        )
        return source, found

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name


#: ``--source``, of commands that need the factors of an artifact.
source_option = click.option(
    "--source",
    "sources",
    type=SourceFile(),
    multiple=True,
    help="Of a thin artifact: a LoRA that it was compiled from. Repeat it for the others.",
)


class HubId(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """``OWNER/NAME`` or ``NAME`` of a repository on the Hugging Face Hub."""

    name = "OWNER/NAME"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        text = str(value)
        part = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
        if not re.fullmatch(rf"{part}(?:/{part})?", text, re.ASCII):
            self.fail(f"{text!r} is not an id on the Hub, {self.name}.", param, ctx)
        return text

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name
