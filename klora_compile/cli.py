"""The command line. Nothing here imports torch, so ``klora --help`` is fast."""

from __future__ import annotations

from typing import Any

import click

from klora_compile.commands.card import card_command
from klora_compile.commands.compile import compile_command
from klora_compile.commands.export import export_command
from klora_compile.commands.inspect import inspect_command
from klora_compile.commands.recompile import recompile_command
from klora_compile.commands.sample import sample_command
from klora_compile.commands.verify import verify_command
from klora_runtime import __version__
from klora_runtime.errors import ConfigError, KloraError


class _Klora(click.Group):
    """A command group that prints klora's errors as one message and exits with 1 (usage: 2)."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            raise click.UsageError(str(error)) from error
        except KloraError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Klora, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="klora")
def main() -> None:
    """Precompile LoRAs into one fused artifact, and look at what is inside."""


for _command in (
    compile_command,
    recompile_command,
    inspect_command,
    verify_command,
    sample_command,
    card_command,
    export_command,
):
    main.add_command(_command)

if __name__ == "__main__":
    main()
