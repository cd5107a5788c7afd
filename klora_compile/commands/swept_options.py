"""Options of ``klora sweep`` with several values: settings of rules, of all rules, of the sampling.

The order in which they are named is the order of the axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from klora_compile.fields import BySlot, Flag, Number, Setting, Table, Text, Whole, Word
from klora_compile.rules.lookup import DEFAULT_RULE, RULES
from klora_compile.trying.names import (
    RULE,
    SAMPLING,
    all_settings,
    rule_settings,
    shared_settings,
    split,
    value_of,
)
from klora_runtime.errors import ConfigError

#: Key of ``Context.meta`` with the names of options in the order in which they were given.
_ORDER = f"{__name__}.order"

_SAMPLING_HELP = {
    "negative_prompt": "What not to show.",
    "steps": "Steps.  [default: the pipeline's]",
    "seed": "Seed.  [default: 0]",
    "guidance": "Guidance scale.  [default: the pipeline's]",
    "height": "Pixels.  [default: the pipeline's]",
    "width": "Pixels.  [default: the pipeline's]",
}


class Values(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """One value of a setting or several, such as ``0,0.3``, or ``style=0.6,1`` for one slot.

    Args:
        name: full name of the setting, without a slot.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._kind = SAMPLING[name][1] if name in SAMPLING else None
        self._setting = all_settings().get(name)
        self.name = self._metavar()

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[Any, ...]]:
        if isinstance(value, tuple):
            return value
        name, text = self._name, str(value)
        if self._is_by_slot:
            slot, sign, text = text.partition("=")
            if not slot or not sign:
                self.fail(f"{value!r} is not {self.name}.", param, ctx)
            name = f"{name}.{slot}"
        parts = [text] if self._is_text else text.split(",")
        try:
            return name, tuple(value_of(name, part.strip()) for part in parts)
        except ConfigError as error:
            self.fail(str(error), param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name

    @property
    def _is_by_slot(self) -> bool:
        return self._setting is not None and isinstance(self._setting.kind, BySlot)

    @property
    def _is_text(self) -> bool:
        """Whether a comma may be a part of the value."""
        kind: Any = self._kind if self._setting is None else self._setting.kind
        kind = kind.of if isinstance(kind, BySlot) else kind
        return isinstance(kind, Text | Table)

    def _metavar(self) -> str:
        kind: Any = self._kind if self._setting is None else self._setting.kind
        slot = "SLOT=" if isinstance(kind, BySlot) else ""
        kind = kind.of if isinstance(kind, BySlot) else kind
        match kind:
            case Text(metavar=metavar):
                return f"{slot}{metavar}"
            case Table():
                return "FILE"
            case Word(words=words):
                return f"{'|'.join(words)},..."
            case Flag():
                return "yes|no,..."
            case Number() | Whole():
                return f"{slot}N,..."
            case _:
                return f"{'|'.join(RULES)},..."


class SweepCommand(click.Command):
    """A command whose options are the settings of all rules; it knows the order of the options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args([*args])
        ctx.meta[_ORDER] = tuple(dict.fromkeys(str(each.name) for each in order))
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        params = super().get_params(ctx)
        return [*params[:-1], *_options().values(), params[-1]]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = _options()
        _write(ctx, formatter, "Options", super().get_params(ctx))
        own = [RULE, *SAMPLING.keys() - {"prompt"}, *shared_settings()]
        shared = [each for name, each in options.items() if name in own]
        _write(ctx, formatter, "Settings of every cell, or axes", shared)
        for rule in RULES:
            named = [options[name] for name in rule_settings(rule)]
            _write(ctx, formatter, f"Settings of rule {rule}", named)


def settings_in_order(values: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Return full name -> values, of the options that were given, in their order.

    Args:
        values: parameter name -> what :class:`Values` gave, of all options of this module.

    Raises:
        click.UsageError: an option that may not be repeated by its slot was.
    """
    found: dict[str, tuple[Any, ...]] = {}
    order: Sequence[str] = click.get_current_context().meta.get(_ORDER, ())
    for parameter in sorted(values, key=lambda name: order.index(name) if name in order else -1):
        given = values[parameter]
        for name, each in (given,) if given and isinstance(given[0], str) else given or ():
            if name in found:
                raise click.UsageError(f"{name} is named twice; name all its values at once.")
            found[name] = each
    return found


def _options() -> dict[str, click.Option]:
    """Return full name -> option."""
    sampling = {name: _option(name, None, text) for name, text in _SAMPLING_HELP.items()}
    rule = _option(RULE, None, f"Which LoRA acts where and when.  [default: {DEFAULT_RULE}]")
    settings = {name: _option(name, each, each.help) for name, each in all_settings().items()}
    return {RULE: rule, **sampling, **settings}


def _option(name: str, setting: Setting | None, text: str) -> click.Option:
    stem, _ = split(name)
    by_slot = setting is not None and isinstance(setting.kind, BySlot)
    flag = f"--{stem.replace('_', '-').replace('.', '-')}"
    help_text = text
    if by_slot and setting is not None and isinstance(setting.kind, BySlot):
        help_text = f"{text.rstrip('.')}, such as {setting.kind.example}; may be repeated."
    elif setting is not None and isinstance(setting.kind, Number | Whole):
        help_text = f"{text}  [range: {setting.kind.range}]"
    return click.Option(
        [flag, stem.replace(".", "_")], type=Values(name), multiple=by_slot, help=help_text
    )


def _write(
    ctx: click.Context,
    formatter: click.HelpFormatter,
    title: str,
    params: Sequence[click.Parameter],
) -> None:
    records = [record for param in params if (record := param.get_help_record(ctx)) is not None]
    if records:
        with formatter.section(title):
            formatter.write_dl(records)
