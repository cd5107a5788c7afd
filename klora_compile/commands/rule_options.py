"""The options of each rule, and commands that take those of one rule or of all.

No option has a default here: what is not given is left to the rule, and its help says what that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import click

from klora_compile.commands.parameters import NumberOr, SlotText, Weight

DEFAULT_RULE = "klora"

_PATTERN = (
    click.Option(
        ["--semantics"],
        type=click.Choice(["paper", "authors"]),
        help="K-LoRA as published, or as its authors' code computes: their gamma, their offset of "
        "s*, ties to the style, the network alpha ignored.  [default: paper]",
    ),
    click.Option(
        ["--pattern"],
        type=click.Choice(["s", "s*"]),
        help="s: content early, style late. s*: style, content, style; suggested for FLUX.  "
        "[default: s]",
    ),
    click.Option(["--alpha"], type=float, help="Slope of S over progress.  [default: 1.5]"),
    click.Option(
        ["--beta"],
        type=float,
        help="S at progress 0; higher favours style.  [default: 0.5; for s* 1.3, authors 0.85 "
        "alpha]",
    ),
    click.Option(
        ["--gamma"],
        type=NumberOr("paper", "code"),
        help="Balance of magnitudes: ratio of sums, mean of ratios, or a number; higher favours "
        "style.  [default: as the semantics]",
    ),
    click.Option(
        ["--bias"],
        type=float,
        help="From -1 to 1: gamma is multiplied by 4 to the power of minus this; above 0 favours "
        "content.  [default: 0]",
    ),
    click.Option(
        ["--top-k"],
        type=NumberOr("auto", whole=True),
        help="Weights of a layer that count; auto is the product of its two (largest) ranks.  "
        "[default: auto]",
    ),
)
_MU = click.Option(
    ["--mu"],
    type=float,
    help="How far the content keeps off the style's input directions, 0 (not) to 1e6.  "
    "[default: 0.5]",
)

#: Rule -> its own options; the names are those of the fields of its class.
RULE_OPTIONS: Mapping[str, tuple[click.Option, ...]] = {
    "klora": _PATTERN,
    "est": (
        click.Option(
            ["--alpha"], type=float, help="Slope of the threshold over progress.  [default: 1.5]"
        ),
        click.Option(
            ["--d"],
            type=float,
            help="Discrepancy of the style, 0 to 2; higher favours content.  [default: 0.5]",
        ),
    ),
    "np": (_MU,),
    "np+klora": (_MU, *_PATTERN),
    "direct": (),
    "switch": (
        click.Option(["--steps"], type=int, help="Steps of the runs that it is for.  [required]"),
        click.Option(["--tau"], type=int, help="Steps of one LoRA's turn.  [default: 5]"),
    ),
    "phases": (
        click.Option(
            ["--content-phases"],
            metavar="POINTS",
            help="Weights from a progress on, as 0:1,0.4:0.2.  [default: 0:1]",
        ),
        click.Option(["--style-phases"], metavar="POINTS", help="The same.  [default: 0:1]"),
        click.Option(
            ["--phases", "slot_phases"],
            type=SlotText("POINTS"),
            multiple=True,
            help="Of one of several LoRAs, as content.2=0:0,0.5:1; may be repeated.",
        ),
    ),
}

_SHARED = (
    click.option(
        "--content-weight",
        type=float,
        help="Factor on the contents' deltas where they are applied; does not change the choice.  "
        "[default: 1]",
    ),
    click.option(
        "--style-weight",
        type=float,
        help="Factor on the styles' deltas where they are applied; does not change the choice.  "
        "[default: 1]",
    ),
    click.option(
        "--weight",
        "weights",
        type=Weight(),
        multiple=True,
        help="A further factor on one of several LoRAs, as content.2=0.5; may be repeated.",
    ),
    click.option(
        "--text-encoder",
        type=click.Choice(["both", "content", "style", "none"]),
        help="Whose text encoder layers act; they have no steps.  [default: both]",
    ),
    click.option(
        "--unpaired",
        type=click.Choice(["keep", "drop", "error"]),
        help="Denoiser layers that only one LoRA adapts.  [default: keep]",
    ),
)


def rule_option(default: str | None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``--rule``; None as the default means that of the artifact."""
    return click.option(
        "--rule",
        type=click.Choice(list(RULE_OPTIONS)),
        default=default,
        show_default=True,
        help="Which LoRA acts where and when. --rule NAME --help lists the rule's own options.",
    )


def shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """The settings that all rules have."""
    for option in reversed(_SHARED):
        command = option(command)
    return command


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among option values: those that were given, as :class:`Config` takes them."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, tuple):
            found |= {name: dict(value)} if value else {}
        elif value is not None:
            found[name] = None if (name, value) == ("top_k", "auto") else value
    return found


class RuleCommand(click.Command):
    """A command whose options include those of the rule that ``--rule`` names.

    A rule that is not named is :attr:`default_rule`.
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
        for rule in self._rules(ctx):
            _write(ctx, formatter, f"Options of --rule {rule}", RULE_OPTIONS[rule])

    def _rules(self, ctx: click.Context) -> tuple[str, ...]:
        rule = ctx.meta.get(__name__)
        if rule is None:
            return tuple(RULE_OPTIONS)
        return (rule,) if rule in RULE_OPTIONS else ()


class AllRulesCommand(RuleCommand):
    """The same, with the options of all rules where none is named."""

    default_rule = None


def _named(args: Iterable[str]) -> str | None:
    """The last value of ``--rule`` among raw arguments."""
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
