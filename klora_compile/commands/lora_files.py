"""LoRAs on the command line: in one file, or in two for models with two denoisers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from klora_compile.commands.names import FileName, Named
from klora_compile.halves import Halves, halves_of

#: A LoRA's file, or its two files in the order in which they were named.
Files = tuple[Named, ...]

_ORDERS = ("high,low", "low,high")


class LoraFiles(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """``FILE``, or ``HIGH,LOW``: the files of a LoRA for high and for low noise."""

    name = "FILE[,FILE]"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Files:
        if isinstance(value, tuple):
            return value
        lora = FileName(folders=True)
        return tuple(lora.convert(part, param, ctx) for part in parts_of(str(value)))

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name


def parts_of(text: str) -> tuple[str, ...]:
    """Split ``HIGH,LOW``; a name that exists, or has another number of commas, is one file."""
    parts = text.split(",")
    return tuple(parts) if len(parts) == 2 and all(parts) and not Path(text).exists() else (text,)


#: The option ``--halves``.
halves_order = click.option(
    "--halves",
    type=click.Choice(_ORDERS),
    help="The order of a LoRA's two files HIGH,LOW, if their names do not say it.",
)
#: The option ``--both-denoisers``.
both_denoisers = click.option(
    "--both-denoisers",
    is_flag=True,
    help="LoRAs in one file change both denoisers of the base model, such as those of an earlier "
    "version that has one.",
)


def refuse_idle_order(halves: str | None, loras: Iterable[Files]) -> None:
    """Refuse ``--halves`` if no LoRA is in two files.

    Raises:
        click.UsageError: it would change nothing.
    """
    if halves is not None and not any(len(set(files)) == 2 for files in loras):
        raise click.UsageError("--halves: no LoRA is named as two files HIGH,LOW; leave it out.")


def lora_of(files: Files, halves: str | None, *, both: bool) -> Path | Halves[Path]:
    """Return a LoRA as the compiler takes it.

    Args:
        files: the path of its file, or of its two.
        halves: the value of ``--halves``.
        both: whether a LoRA in one file changes both denoisers.

    Raises:
        ConfigError: see :func:`~klora_compile.halves.halves_of`.
    """
    one, other = Path(files[0]), Path(files[-1])
    if len(files) == 1:
        return Halves(one, one) if both else one
    if halves is None:
        return halves_of(one, other)
    first, second = halves.split(",")
    return halves_of(one, other, (first, second))
