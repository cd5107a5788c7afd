"""The result of a command, as text for people or as one JSON object for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import click

#: Version of the objects that ``--json`` prints; it increases if a field goes or changes meaning.
SCHEMA = 1

#: The option ``--json`` of every command.
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as one JSON object."
)


def print_json(kind: str, facts: Mapping[str, Any]) -> None:
    """Print one object: the schema version, its kind, and its fields."""
    click.echo(json.dumps({"schema": SCHEMA, "kind": kind, **facts}))


def print_result(
    as_json: bool, kind: str, facts: Callable[[], Mapping[str, Any]], text: Callable[[], str]
) -> None:
    """Print the result of a command as text or JSON; only the requested form is computed."""
    if as_json:
        print_json(kind, facts())
    else:
        click.echo(text())
