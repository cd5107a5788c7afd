"""The options of each rule, and commands that take the options of one rule or of all rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

import click

from klora_compile.commands.setting_options import options_of
from klora_compile.rules.lookup import DEFAULT_RULE, RULES

#: Name of a rule -> its options.
RULE_OPTIONS: Mapping[str, tuple[click.Option, ...]] = {
    name: options_of(kind) for name, kind in RULES.items()
}


def rule_option(default: str | None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return the option ``--rule``; a default of None means the artifact's rule."""
    return click.option(
        "--rule",
        type=click.Choice(list(RULE_OPTIONS)),
        default=default,
        show_default=True,
        help="Which LoRA acts where and when. --rule NAME --help lists the rule's own options.",
    )


class RuleCommand(click.Command):
    """A command whose options include those of the rule that ``--rule`` names.

    Without ``--rule``, it is :attr:`default_rule`.
    """

    default_rule: ClassVar[str | None] = DEFAULT_RULE

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[__name__] = _named(args) or self.default_rule
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            owners = [name for name in RULE_OPTIONS if error.option_name in _flags(name)]
            if not owners:
                raise
            raise click.UsageError(
                f"{error.option_name} is an option of --rule {' and --rule '.join(owners)}, not of "
                f"--rule {ctx.meta[__name__]}.",
                ctx,
            ) from error

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        params = super().get_params(ctx)
        own = {option.name: option for rule in self._rules(ctx) for option in RULE_OPTIONS[rule]}
        return [*params[:-1], *own.values(), params[-1]]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write(ctx, formatter, "Options", super().get_params(ctx))
        with formatter.section("Rules"):
            formatter.write_dl([(name, f"{kind.sentence}.") for name, kind in RULES.items()])
        for rule in self._rules(ctx):
            _write(ctx, formatter, f"Options of --rule {rule}", RULE_OPTIONS[rule])

    def _rules(self, ctx: click.Context) -> tuple[str, ...]:
        rule = ctx.meta.get(__name__)
        if rule is None:
            return tuple(RULE_OPTIONS)
        return (rule,) if rule in RULE_OPTIONS else ()


class AllRulesCommand(RuleCommand):
    """A command that has the options of all rules, unless ``--rule`` names one."""

    default_rule = None


def _named(args: Iterable[str]) -> str | None:
    """Return the last value of ``--rule`` among raw arguments."""
    rule, before = None, ""
    for argument in args:
        if before == "--rule":
            rule = argument
        elif argument.startswith("--rule="):
            rule = argument.removeprefix("--rule=")
        before = argument
    return rule


def _flags(rule: str) -> set[str]:
    return {flag for option in RULE_OPTIONS[rule] for flag in option.opts}


def _write(
    ctx: click.Context,
    formatter: click.HelpFormatter,
    title: str,
    params: Iterable[click.Parameter],
) -> None:
    records = [record for param in params if (record := param.get_help_record(ctx)) is not None]
    if records:
        with formatter.section(title):
            formatter.write_dl(records)
