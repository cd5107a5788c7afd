"""Model cards as a Markdown reader and a YAML reader see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from support.shipped import klora


def card_of(artifact: Path, *options: object) -> str:
    result = klora("card", artifact, "-o", "-", *options)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def split(card: str) -> tuple[dict[str, Any], str]:
    """Front matter and body."""
    before, front, body = card.split("---\n", 2)
    assert before == ""
    return yaml.safe_load(front), body


def tokens(body: str) -> list[Token]:
    """Everything that a Markdown reader sees, in order."""
    found = []
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(body):
        found += [token, *(token.children or [])]
    return found


def section(body: str, title: str) -> str:
    return body.partition(f"\n## {title}\n")[2].partition("\n## ")[0].strip("\n")


def rows(part: str) -> list[list[str]]:
    """The text of each row of a section's tables."""
    seen: list[list[str]] = []
    cell = False
    for token in MarkdownIt("commonmark").enable("table").parse(part):
        if token.type == "tr_open":
            seen.append([])
        cell = token.type in ("td_open", "th_open") or (cell and token.type == "inline")
        if token.type == "inline" and cell:
            seen[-1].append("".join(child.content for child in token.children or []))
    return seen
