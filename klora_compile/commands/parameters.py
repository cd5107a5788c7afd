"""Option types that click does not have."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from klora_compile.commands.names import FileName
from klora_runtime.devices.device_types import NAME, SPELLINGS
from klora_runtime.hub.choosing import LORA
from klora_runtime.hub.fetching import located

#: The option ``-o`` of commands that write an artifact.
artifact_output = click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The artifact to write, by custom NAME.klora.safetensors.",
)

drop_unused_option = click.option(
    "--drop-unused",
    is_flag=True,
    help="Store only what this schedule uses. The file is smaller, and klora recompile cannot make "
    "schedules that use more.",
)

#: The option ``--shift`` of commands that report on steps.
shift_option = click.option(
    "--shift",
    type=float,
    help="For the clock of the noise: the shift of the schedule that the report assumes. It "
    "changes no choice.  [range: 0.01 to 1000; default: 1 and 3, side by side]",
)

#: The options ``--workers`` and ``--engine`` of commands that work on many LoRAs.
workers_option = click.option(
    "--workers",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Work in so many processes at once.",
)
engine_option = click.option(
    "--engine",
    default="processes",
    show_default=True,
    help="Where the workers are: processes of this machine, ray, or ray:ADDRESS of a cluster "
    "whose machines see the same files.",
)

_LARGEST = 1e15


class NumberOr(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """A number, or one of some words.

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
    """The name of a device of torch; whether the machine has the device is checked on use."""

    name = "|".join((*SPELLINGS, "NAME[:N]"))

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        text = str(value)
        if not re.fullmatch(NAME, text):
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


class TableFile(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """A JSON file with one object, or the name of a table.

    Args:
        names: the known names; a file of such a name needs its folder before it (``./NAME``).
    """

    def __init__(self, *names: str) -> None:
        self.name = "|".join(("FILE", *names))
        self._names = names

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, object] | str:
        if isinstance(value, dict):
            return value
        if isinstance(value, str) and value in self._names:
            return value
        path = Path(str(click.Path(exists=True, dir_okay=False).convert(str(value), param, ctx)))
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            self.fail(f"{path} is no JSON file: {error}.", param, ctx)
        if not isinstance(found, dict):
            self.fail(f"{path} is no JSON object.", param, ctx)
        return found

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name


class SlotText(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """``SLOT=`` followed by a text.

    Args:
        what: the name of the text.
        of: what stands before the sign.
    """

    def __init__(self, what: str, of: str = "SLOT") -> None:
        self.name = f"{of}={what}"

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
    """``NAME=FILE``, such as ``content=fox.safetensors``; a name on the Hub is downloaded."""

    name = "NAME=FILE"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Path]:
        if isinstance(value, tuple):
            return value
        source, sign, path = str(value).partition("=")
        if not source or not sign:
            self.fail(f"{value!r} is not {self.name}.", param, ctx)
        return source, Path(located(FileName().convert(path, param, ctx), LORA))

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name


#: The option ``--source`` of commands that need the factors of an artifact.
source_option = click.option(
    "--source",
    "sources",
    type=SourceFile(),
    multiple=True,
    help="A LoRA that a thin artifact was compiled from. Repeat it for the others.",
)

#: The option ``--signed-by`` of commands that open an artifact.
signed_by_option = click.option(
    "--signed-by",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="KEY",
    help="The author's public key or certificate, a PEM file. FILE.sig must be a signature of FILE "
    "by it.",
)

#: The option ``--picture`` of commands that write a card.
samples_option = click.option(
    "--picture",
    "samples",
    type=(click.Path(exists=True, dir_okay=False, path_type=Path), str),
    multiple=True,
    metavar="FILE PROMPT",
    help="A picture made with the artifact, and its prompt. Repeat it for several.",
)


class HubId(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """``OWNER/NAME`` or ``NAME`` of a repository on the Hugging Face Hub.

    Args:
        owned: whether the owner must be named.
    """

    name = "OWNER/NAME"

    def __init__(self, *, owned: bool = False) -> None:
        self._owned = owned

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        text = str(value)
        part = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
        owner = "" if self._owned else "?"
        if not re.fullmatch(rf"(?:{part}/){owner}{part}", text, re.ASCII):
            self.fail(f"{text!r} is not an id on the Hub, {self.name}.", param, ctx)
        return text

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name
