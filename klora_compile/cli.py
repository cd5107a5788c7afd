"""The command line. A command's module is imported when the command is used or described.

Nothing that is imported before a command runs imports torch, so ``klora --help`` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from klora_runtime import __version__
from klora_runtime.errors import ConfigError, KloraError

#: The commands. Command NAME is ``NAME_command`` of ``commands.NAME``.
COMMANDS = (
    *("cache", "card", "catalogue", "compile", "export", "inspect", "profile", "pull", "push"),
    *("recompile", "sample", "sign", "sweep", "tune"),
    "verify",
)


class _Klora(click.Group):
    """A command group that prints klora's errors as one message and exits with 1 (usage: 2)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"klora_compile.commands.{cmd_name}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

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


if __name__ == "__main__":
    main()
