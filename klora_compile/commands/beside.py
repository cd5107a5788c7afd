"""The option ``--always``: LoRAs that act beside the others, by name, each with its weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import click

from klora_compile.commands.lora_files import Files, lora_of, parts_of
from klora_compile.commands.names import FileName
from klora_compile.halves import Halves


@dataclass(frozen=True)
class Beside:
    """A LoRA that acts beside the others."""

    name: str
    files: Files
    """As they were named."""
    weights: tuple[float | None, ...]
    """Weight of each file, if one was given."""


class BesideLora(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """``NAME=FILE``, ``NAME=FILE:WEIGHT``, or ``NAME=HIGH:WEIGHT,LOW:WEIGHT``.

    Such as ``turbo=lightning.safetensors:0.8``.
    """

    name = "NAME=FILE[:WEIGHT]"
    file = FileName(folders=True)

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Beside:
        if isinstance(value, Beside):
            return value
        name, sign, text = str(value).partition("=")
        if not name or not sign or not text:
            self.fail(f"{value!r} is not {self.name}.", param, ctx)
        found = [_weighted(part) for part in parts_of(text)]
        files = tuple(self.file.convert(path, param, ctx) for path, _ in found)
        return Beside(name, files, tuple(weight for _, weight in found))

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name


class BesideArtifact(BesideLora):
    """The same with artifacts, such as ``turbo=turbo.klora.safetensors:0.8``."""

    file = FileName()

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Beside:
        found = super().convert(value, param, ctx)
        if len(found.files) > 1:
            self.fail(
                f"{found.name} names two artifacts; compile both files of the LoRA to one: klora "
                "compile HIGH,LOW -o OUT.klora.safetensors.",
                param,
                ctx,
            )
        return found


def _weighted(text: str) -> tuple[str, float | None]:
    """Split ``FILE:WEIGHT``; the name of a file may end with a colon and a number."""
    path, _, factor = text.rpartition(":")
    if path and not Path(text).exists():
        try:
            return path, float(factor)
        except ValueError:
            pass
    return text, None


def by_name(
    always: Iterable[Beside],
    weights: Iterable[tuple[str, float]],
    halves: str | None = None,
    *,
    both: bool = False,
) -> tuple[dict[str, Path | Halves[Path]], dict[str, float]]:
    """Return name -> LoRA, and slot or half -> weight, of what ``--always`` named.

    Args:
        always: the option's values.
        weights: the values of ``--weight``.
        halves: see :func:`~klora_compile.commands.lora_files.lora_of`.
        both: see there.

    Raises:
        click.UsageError: a name occurs twice, or a weight is in both options.
        ConfigError: see :func:`~klora_compile.halves.halves_of`.
    """
    loras: dict[str, Path | Halves[Path]] = {}
    factors: dict[str, float] = {}
    elsewhere = {slot for slot, _ in weights}
    for each in always:
        name = each.name
        if name in loras:
            raise click.UsageError(f"--always names {name} twice; give each LoRA its own name.")
        found = loras[name] = lora_of(each.files, halves, both=both)
        slots = [name]
        if len(each.files) == 2 and isinstance(found, Halves):
            slots = [f"{name}.high", f"{name}.low"]
            if found.high != Path(each.files[0]):
                slots.reverse()
        for slot, weight in zip(slots, each.weights, strict=True):
            if weight is None:
                continue
            if {slot, name} & elsewhere:
                raise click.UsageError(
                    f"the weight of {name} is in --always and in --weight; leave one of them out."
                )
            factors[slot] = weight
    return loras, factors
