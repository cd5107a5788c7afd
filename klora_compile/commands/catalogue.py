"""``klora catalogue``: every subject in every style, from the profiles of a store."""

from __future__ import annotations

from importlib import import_module

import click

#: Commands on a file; anything else is a store, from which a catalogue is made.
_ON_FILES = ("check", "get", "list", "show", "steps")


class _Catalogue(click.Group):
    """A group whose first argument may be a store instead of a command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*_ON_FILES, "build", "-h", "--help"):
            args = ["build", *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        build = self.get_command(ctx, "build")
        assert build is not None
        build.format_options(
            build.make_context("build", ["--help"], ctx, resilient_parsing=True), formatter
        )

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["build", *_ON_FILES]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "build":
            module = import_module("klora_compile.commands.catalogue_build")
        elif cmd_name in _ON_FILES:
            module = import_module("klora_compile.commands.catalogue_files")
        else:
            return None
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command


@click.command("catalogue", cls=_Catalogue)
def catalogue_command() -> None:
    """Link every subject with every style, and serve any pair.

    klora catalogue STORE --content GLOB --style GLOB -o FILE makes a catalogue from a store of
    klora profile; its options are those of klora catalogue build --help. A store that has the name
    of a command is ./NAME.
    """
