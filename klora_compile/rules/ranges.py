"""Checks of settings, in one wording."""

from __future__ import annotations

from klora_runtime.errors import ConfigError


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """See that ``value`` is one of ``choices``.

    Raises:
        ConfigError: it is not.
    """
    if value not in choices:
        raise ConfigError(f"{name}: expected one of {', '.join(choices)}, found {value!r}.")


def require_number(name: str, value: object, low: float, high: float) -> None:
    """See that ``value`` is a number from ``low`` to ``high``.

    Raises:
        ConfigError: it is not.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # type: ignore[operator]
        raise ConfigError(f"{name}: expected a number from {low:g} to {high:g}, found {value!r}.")


def require_whole(name: str, value: object, low: int, high: int | None = None) -> None:
    """See that ``value`` is a whole number from ``low`` on, to ``high`` where there is one.

    Raises:
        ConfigError: it is not.
    """
    if type(value) is not int or value < low or (high is not None and value > high):
        end = "" if high is None else f" to {high}"
        raise ConfigError(f"{name}: expected a whole number from {low}{end}, found {value!r}.")
