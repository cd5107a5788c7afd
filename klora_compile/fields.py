"""A setting, written once: a field of a dataclass whose metadata say what it means and may be.

    bias: float = field(default=0.0, metadata=setting("Multiplies gamma by ...", Number(-1, 1)))

From that come the check of the value, the option on the command line with its help, and the pages
of the documentation. Nothing here imports torch or click.
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
    """A number in a range, or one of a few words that stand for one."""

    low: float
    high: float
    words: tuple[str, ...] = ()

    @property
    def what(self) -> str:
        return "a number"

    @property
    def range(self) -> str:
        """The range as people read it."""
        return f"{self.low:g} to {self.high:g}"

    def check(self, name: str, value: object) -> None:
        """See that a value is of this kind.

        Args:
            name: of the setting, for the error.
            value: what was given.

        Raises:
            ConfigError: it is not.
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
    """None: no upper end."""

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
    """Name of the option that says no; None where leaving the option out says it."""

    def check(self, name: str, value: object) -> None:
        """See :meth:`Number.check`."""
        if not isinstance(value, bool):
            raise ConfigError(f"{name}: expected a boolean, found {value!r}.")


@dataclass(frozen=True)
class Text:
    """A text with a notation of its own, which its owner reads and checks."""

    metavar: str
    what: str
    """The notation, for errors."""

    def check(self, name: str, value: object) -> None:
        """Left to the owner of the field."""


@dataclass(frozen=True)
class BySlot:
    """A mapping: slot -> value of one kind."""

    of: Number | Text
    each: str
    """What one of the values is called in errors."""
    example: str
    """One of them as the command line takes it, SLOT=VALUE."""

    def check(self, name: str, value: object) -> None:
        """See :meth:`Number.check`; that the slots exist is checked where they are known."""
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name}: expected slots with {self.of.what} each, found {value!r}.")
        for slot, each in value.items():
            self.of.check(f"{self.each} of {slot}", each)


@dataclass(frozen=True)
class Place:
    """A file or folder on disk, checked where it is opened."""

    def check(self, name: str, value: object) -> None:
        """Left to the reader."""


Kind: TypeAlias = Number | Whole | Word | Flag | Text | BySlot | Place


@dataclass(frozen=True)
class Setting:
    """What a field says of itself."""

    help: str
    """What it does, as a sentence or two that start with what it is; the command line's help."""
    kind: Kind
    option: str | None = None
    """The option's name without its dashes, where it is not the field's."""
    default: str | None = None
    """The default in words, where it depends on other settings."""
    unset: str | None = None
    """The word that stands for None on the command line and in artifacts."""


def setting(
    help: str,
    kind: Kind,
    *,
    option: str | None = None,
    default: str | None = None,
    unset: str | None = None,
) -> Mapping[str, Setting]:
    """Metadata of a field that is a setting; the arguments are the fields of :class:`Setting`."""
    return {_KEY: Setting(help, kind, option, default, unset)}


def setting_of(field: Field[Any]) -> Setting:
    """What a field says of itself."""
    found = field.metadata[_KEY]
    assert isinstance(found, Setting)
    return found


def settings_of(kind: type[DataclassInstance]) -> dict[str, Setting]:
    """Name of a field -> what it says of itself, in their order."""
    return {field.name: setting_of(field) for field in fields(kind)}


def is_required(field: Field[Any]) -> bool:
    """Whether a field has no default."""
    return field.default is MISSING and field.default_factory is MISSING


def check_settings(record: DataclassInstance) -> None:
    """See that every field of a record holds what its metadata allow; None is a default only.

    Raises:
        ConfigError: the first field that does not.
    """
    for field in fields(record):
        value = getattr(record, field.name)
        if value is not None or field.default is not None:
            setting_of(field).kind.check(field.name, value)
