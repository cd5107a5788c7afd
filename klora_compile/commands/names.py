"""Files as users name them: a path, or a name on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import click

from klora_runtime.errors import ConfigError
from klora_runtime.hub.address import address_of
from klora_runtime.hub.choosing import ARTIFACT, EITHER, LORA, Kind
from klora_runtime.hub.fetching import located

#: A path that exists, or a name on the Hub.
Named = str | Path

_WEIGHT_NAME = "--weight-name"


class FileName(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """A path that exists, or a name on the Hub, which stays text until it is looked up.

    Args:
        folders: whether the path may be a folder.
    """

    name = "FILE"

    def __init__(self, *, folders: bool = False) -> None:
        self._path = click.Path(exists=True, dir_okay=folders, path_type=Path)

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Named:
        if isinstance(value, Path) or address_of(str(value)) is None:
            path: Path = self._path.convert(str(value), param, ctx)
            return path
        return str(value)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name


class WeightName(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """``FILE``, or ``SLOT=FILE``, such as ``content=fox.safetensors``."""

    name = "[SLOT=]FILE"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str | None, str]:
        if isinstance(value, tuple):
            return value
        slot, sign, file = str(value).rpartition("=")
        if not file or (sign and not slot):
            self.fail(f"{value!r} is not {self.name}.", param, ctx)
        return slot or None, file

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name


#: The option ``--weight-name`` of commands that take one file.
weight_name_option = click.option(
    _WEIGHT_NAME, metavar="FILE", help="The file in a repository of the Hub that has several."
)
#: The option ``--weight-name`` of commands that take several LoRAs.
weight_names_option = click.option(
    _WEIGHT_NAME,
    "weight_names",
    type=WeightName(),
    multiple=True,
    help="The file in a repository of the Hub that has several, such as content=fox.safetensors. "
    "Repeat it for the others.",
)


def artifact_argument(command: Callable[..., None]) -> Callable[..., None]:
    """Add the argument FILE, an artifact; the command gets its path."""
    return _file_argument(ARTIFACT, FileName(), command)


def file_argument(command: Callable[..., None]) -> Callable[..., None]:
    """Add the argument FILE, an artifact or a LoRA; the command gets its path."""
    return _file_argument(EITHER, FileName(folders=True), command)


def _file_argument(kind: Kind, what: FileName, command: Callable[..., None]) -> Callable[..., None]:
    @wraps(command)
    def with_file(file: Named, weight_name: str | None, **values: Any) -> None:
        command(file=Path(located(file, kind, weight_name)), **values)

    option = weight_name_option(with_file)
    wrapped: Callable[..., None] = click.argument("file", type=what)(option)
    return wrapped


def located_files(
    loras: Mapping[str, Sequence[Named]], weight_names: Sequence[tuple[str | None, str]]
) -> dict[str, tuple[Path, ...]]:
    """Return slot -> the paths of a LoRA's files, after downloading those on the Hub.

    Args:
        loras: slot -> the files as they were named.
        weight_names: the values of ``--weight-name``.

    Raises:
        ConfigError: ``--weight-name`` names an unknown slot, or fits no LoRA, or several.
        KloraError: the Hub does not give a file.
    """
    open_slots = [slot for slot, files in loras.items() if any(map(_is_open, files))]
    names: dict[str, str] = {}
    for slot, file in weight_names:
        if slot is None and len(open_slots) != 1:
            raise ConfigError(
                f"{_WEIGHT_NAME} {file}: {len(open_slots)} LoRAs are named as a repository alone; "
                f"say which, such as {_WEIGHT_NAME} {(open_slots or list(loras))[0]}={file}."
            )
        which = open_slots[0] if slot is None else slot
        if which not in loras:
            raise ConfigError(
                f"{_WEIGHT_NAME} {which}={file}: there is no LoRA {which}; expected "
                f"{', '.join(loras)}."
            )
        if which in names:
            raise ConfigError(f"{_WEIGHT_NAME} names two files for {which}; leave one of them out.")
        names[which] = file
    return {
        slot: tuple(Path(located(file, LORA, names.get(slot))) for file in files)
        for slot, files in loras.items()
    }


def _is_open(name: Named) -> bool:
    """Return whether a name is of a repository alone."""
    address = address_of(name)
    return address is not None and address.file is None
