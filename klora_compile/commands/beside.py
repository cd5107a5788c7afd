"""The option ``--always``: LoRAs that act beside the others, by name, each with its weight."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from klora_compile.commands.parameters import ARTIFACT, LORA

#: Name, file, and weight if one was given.
Beside = tuple[str, Path, float | None]


class BesideLora(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """``NAME=FILE`` or ``NAME=FILE:WEIGHT``, such as ``turbo=lightning.safetensors:0.8``."""

    name = "NAME=FILE[:WEIGHT]"
    file: click.Path = LORA

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Beside:
        if isinstance(value, tuple):
            return value
        name, sign, text = str(value).partition("=")
        if not name or not sign or not text:
            self.fail(f"{value!r} is not {self.name}.", param, ctx)
        path, _, factor = text.rpartition(":")
        weight = None
        if path and not Path(text).exists():  # the name of a file may end with a colon and a number
            try:
                weight = float(factor)
            except ValueError:
                path = text
        found = self.file.convert(text if weight is None else path, param, ctx)
        return name, Path(str(found)), weight

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name


class BesideArtifact(BesideLora):
    """The same with artifacts, such as ``turbo=turbo.klora.safetensors:0.8``."""

    file = ARTIFACT


def by_name(
    always: Iterable[Beside], weights: Iterable[tuple[str, float]]
) -> tuple[dict[str, Path], dict[str, float]]:
    """Return name -> file, and name -> weight, of what ``--always`` named.

    Args:
        always: the option's values.
        weights: the values of ``--weight``.

    Raises:
        click.UsageError: a name occurs twice, or a weight is in both options.
    """
    files: dict[str, Path] = {}
    factors: dict[str, float] = {}
    elsewhere = {slot for slot, _ in weights}
    for name, path, weight in always:
        if name in files:
            raise click.UsageError(f"--always names {name} twice; give each LoRA its own name.")
        files[name] = path
        if weight is None:
            continue
        if name in elsewhere:
            raise click.UsageError(
                f"the weight of {name} is in --always and in --weight; leave one of them out."
            )
        factors[name] = weight
    return files, factors
