"""Options made from settings: the fields of rules, of shared settings, and of reading options.

Options have no defaults: a setting that is not given keeps the default of its record. The help
states that default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from klora_compile.commands.names import FileName
from klora_compile.commands.parameters import NumberOr, SlotText, TableFile, Weight
from klora_compile.fields import (
    BySlot,
    Flag,
    Number,
    Place,
    Setting,
    Table,
    Text,
    Whole,
    Word,
    is_required,
    setting_of,
)
from klora_compile.settings.read_options import ReadOptions
from klora_compile.settings.shared import Settings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class _Declaration:
    """The arguments of an option."""

    names: tuple[str, str]
    """The flag, and the name of the value."""
    attributes: Mapping[str, Any]

    def option(self) -> click.Option:
        return click.Option(self.names, **self.attributes)

    def add(self, command: _Command) -> _Command:
        """Insert the option before the command's other options."""
        decorated: _Command = click.option(*self.names, **self.attributes)(command)
        return decorated


def options_of(kind: type[DataclassInstance]) -> tuple[click.Option, ...]:
    """Return an option for each setting of a record, in order, named after the field."""
    return tuple(_declared(field).option() for field in fields(kind))


def shared_options(default: str | None = None) -> Callable[[_Command], _Command]:
    """Return the options of :class:`~klora_compile.settings.shared.Settings`.

    Args:
        default: the default of all options, in words; None for each field's default.
    """

    def add(command: _Command) -> _Command:
        for field in reversed(fields(Settings)):
            command = _declared(field, default).add(command)
        return command

    return add


def base_option(command: _Command) -> _Command:
    """Add the option ``--base``."""
    (field,) = (field for field in fields(ReadOptions) if field.name == "base")
    return _declared(field).add(command)


def reading_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of reading LoRAs; the command gets them as the argument ``reading``."""

    @wraps(command)
    def with_reading(**values: Any) -> None:
        own = {field.name: values.pop(field.name) for field in fields(ReadOptions)}
        command(reading=ReadOptions(**given(own)), **values)

    wrapped: Callable[..., None] = with_reading
    for field in reversed(fields(ReadOptions)):
        wrapped = _declared(field).add(wrapped)
    return wrapped


def reading_words(reading: ReadOptions) -> tuple[str, ...]:
    """Return the words of a command line that state options of reading."""
    words: list[str] = []
    for field in fields(reading):
        value = getattr(reading, field.name)
        if value != getattr(ReadOptions(), field.name):
            words += option_words(field.name, value)
    return tuple(words)


def option_words(name: str, value: Any) -> list[str]:
    """Return the words of a command line that set an option, which may be a flag."""
    flag = f"--{name.replace('_', '-')}"
    return [flag] if value is True else [flag, str(value)]


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that were given, by the names of their fields."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, tuple):
            found |= {name: dict(value)} if value else {}
        elif value is not None:
            found[name] = value
    return found


def _declared(field: Field[Any], default: str | None = None) -> _Declaration:
    setting = setting_of(field)
    flag = f"--{setting.option or field.name.replace('_', '-')}"
    attributes: dict[str, Any] = {"help": _help(field, setting, default)}
    kind = setting.kind
    if isinstance(kind, Flag):
        flag += f"/--{kind.off}" if kind.off else ""
        attributes |= {"is_flag": True, "default": None}
    else:
        attributes |= {"type": _type(setting), "multiple": isinstance(kind, BySlot)}
    if isinstance(kind, Text):
        attributes["metavar"] = kind.metavar
    return _Declaration((flag, field.name), attributes)


def _type(setting: Setting) -> Any:
    """Return the click type of a setting."""
    kind = setting.kind
    match kind:
        case Number(words=()):
            return float
        case Number(words=words):
            return NumberOr(*words)
        case Whole():
            return NumberOr(setting.unset, whole=True) if setting.unset else int
        case Word(words=words):
            return click.Choice(words)
        case BySlot(of=Text(metavar=metavar)):
            return SlotText(metavar)
        case BySlot():
            return Weight()
        case Table(names=names):
            return TableFile(*names)
        case Place():
            return FileName(folders=True)
        case _:
            return str


def _help(field: Field[Any], setting: Setting, default: str | None) -> str:
    """Return the setting's help, followed by its range and default in brackets."""
    kind, text = setting.kind, setting.help
    if isinstance(kind, BySlot):
        text = f"{text.rstrip('.')}, such as {kind.example}; may be repeated."
    notes = []
    if isinstance(kind, Number | Whole):
        notes.append(f"range: {kind.range}")
    words = default or setting.default or setting.unset or _default(field)
    if is_required(field):
        notes.append("required")
    elif words:
        notes.append(f"default: {words}")
    return f"{text}  [{'; '.join(notes)}]" if notes else text


def _default(field: Field[Any]) -> str | None:
    kind, value = setting_of(field).kind, field.default
    if isinstance(kind, Flag) and value is False:
        return kind.off
    if value is MISSING or value is None:
        return None
    return f"{value:g}" if isinstance(value, float) else str(value)
