"""What a command found, for people or as one JSON object for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import click

#: Version of the objects that ``--json`` prints. It rises when a field goes or changes its meaning.
SCHEMA = 1

#: ``--json``, of every command.
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as one JSON object."
)


def print_json(kind: str, facts: Mapping[str, Any]) -> None:
    """Print one object: the version of its fields, its kind, and its fields."""
    click.echo(json.dumps({"schema": SCHEMA, "kind": kind, **facts}))


def print_result(
    as_json: bool, kind: str, facts: Callable[[], Mapping[str, Any]], text: Callable[[], str]
) -> None:
    """Print what a command found in the form that was asked for; only that one is made."""
    if as_json:
        print_json(kind, facts())
    else:
        click.echo(text())
