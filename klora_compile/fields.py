"""Settings: fields of dataclasses whose metadata state their meaning and allowed values.

    bias: float = field(default=0.0, metadata=setting("Multiplies gamma by ...", Number(-1, 1)))

The check of the value, the command-line option with its help, and the documentation are derived
from this. Nothing here imports torch or click.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias

from klora_runtime.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_KEY = "setting"


@dataclass(frozen=True)
class Number:
    """A number in a range, or one of a few words that represent a number."""

    low: float
    high: float
    words: tuple[str, ...] = ()

    @property
    def what(self) -> str:
        return "a number"

    @property
    def range(self) -> str:
        """The range as text for people."""
        return f"{self.low:g} to {self.high:g}"

    def check(self, name: str, value: object) -> None:
        """Check that a value is of this kind.

        Args:
            name: name of the setting, for the error.
            value: the given value.

        Raises:
            ConfigError: the value is not of this kind.
        """
        if self.words and isinstance(value, str):
            Word(self.words).check(name, value)
            return
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not self.low <= value <= self.high:  # type: ignore[operator]
            raise ConfigError(f"{name}: expected a number from {self.range}, found {value!r}.")


@dataclass(frozen=True)
class Whole:
    """A whole number in a range."""

    low: int
    high: int | None = None
    """None means no upper end."""

    @property
    def range(self) -> str:
        """See :attr:`Number.range`."""
        return f"{self.low} or more" if self.high is None else f"{self.low} to {self.high}"

    def check(self, name: str, value: object) -> None:
        """See :meth:`Number.check`."""
        if type(value) is not int or value < self.low or (self.high and value > self.high):
            end = "" if self.high is None else f" to {self.high}"
            raise ConfigError(
                f"{name}: expected a whole number from {self.low}{end}, found {value!r}."
            )


@dataclass(frozen=True)
class Word:
    """One of a few words."""

    words: tuple[str, ...]

    def check(self, name: str, value: object) -> None:
        """See :meth:`Number.check`."""
        if value not in self.words:
            expected = self.words[0] if len(self.words) == 1 else f"one of {', '.join(self.words)}"
            raise ConfigError(f"{name}: expected {expected}, found {value!r}.")


@dataclass(frozen=True)
class Flag:
    """Yes or no."""

    off: str | None = None
    """Name of the option that says no; None if omitting the option says no."""

    def check(self, name: str, value: object) -> None:
        """See :meth:`Number.check`."""
        if not isinstance(value, bool):
            raise ConfigError(f"{name}: expected a boolean, found {value!r}.")


@dataclass(frozen=True)
class Text:
    """A text in a notation that the owner of the field parses and checks."""

    metavar: str
    what: str
    """The notation, for errors."""

    def check(self, name: str, value: object) -> None:
        """Do nothing: the owner of the field checks the text."""


@dataclass(frozen=True)
class BySlot:
    """A mapping from slots to values of one kind."""

    of: Number | Text
    each: str
    """Name of a value in errors."""
    example: str
    """An example for the command line, SLOT=VALUE."""

    def check(self, name: str, value: object) -> None:
        """See :meth:`Number.check`; whether the slots exist is checked where they are known."""
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name}: expected slots with {self.of.what} each, found {value!r}.")
        for slot, each in value.items():
            self.of.check(f"{self.each} of {slot}", each)


@dataclass(frozen=True)
class Table:
    """A mapping from rows to values of one kind; on the command line, a JSON file with it."""

    of: Text
    row: str
    """The notation of a row's name, for errors."""
    names: tuple[str, ...] = ()
    """Names of tables that come with the owner of the field, which may stand for one."""

    def check(self, name: str, value: object) -> None:
        """See :meth:`Number.check`; the owner of the field checks the names of rows."""
        if self.names and isinstance(value, str):
            Word(self.names).check(name, value)
            return
        if not isinstance(value, Mapping) or not all(isinstance(row, str) for row in value):
            raise ConfigError(
                f"{name}: expected rows {self.row} with {self.of.what} each, found {value!r}."
            )
        for row, each in value.items():
            self.of.check(f"{name}, {row}", each)


@dataclass(frozen=True)
class Place:
    """A file or folder on disk, which is checked when it is opened."""

    def check(self, name: str, value: object) -> None:
        """Do nothing: the reader checks the file."""


Kind: TypeAlias = Number | Whole | Word | Flag | Text | BySlot | Table | Place


@dataclass(frozen=True)
class Setting:
    """The metadata of a field that is a setting."""

    help: str
    """Help for the command line: one or two sentences that start with what the setting is."""
    kind: Kind
    option: str | None = None
    """The option's name without dashes, if it differs from the field's."""
    default: str | None = None
    """The default in words, if it depends on other settings."""
    unset: str | None = None
    """The word for None on the command line and in artifacts."""


def setting(
    help: str,
    kind: Kind,
    *,
    option: str | None = None,
    default: str | None = None,
    unset: str | None = None,
) -> Mapping[str, Setting]:
    """Return the metadata of a setting; the arguments are the fields of :class:`Setting`."""
    return {_KEY: Setting(help, kind, option, default, unset)}


def setting_of(field: Field[Any]) -> Setting:
    """Return the setting in a field's metadata."""
    found = field.metadata[_KEY]
    assert isinstance(found, Setting)
    return found


def settings_of(kind: type[DataclassInstance]) -> dict[str, Setting]:
    """Return name of a field -> its setting, in order."""
    return {field.name: setting_of(field) for field in fields(kind)}


def is_required(field: Field[Any]) -> bool:
    """Return whether a field has no default."""
    return field.default is MISSING and field.default_factory is MISSING


def check_settings(record: DataclassInstance) -> None:
    """Check that every field of a record has an allowed value; None is allowed as a default only.

    Raises:
        ConfigError: a field has another value; the first one is named.
    """
    for field in fields(record):
        value = getattr(record, field.name)
        if value is not None or field.default is not None:
            setting_of(field).kind.check(field.name, value)
