"""The publication of a rule, as a model card cites it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """One publication."""

    where: str
    """In a few words, as Markdown."""
    link: str
    bibtex: str


def preprint(number: str, key: str, title: str, author: str = "") -> Paper:
    """A paper on arXiv.

    Args:
        number: such as ``2402.16843``.
        key: of its BibTeX entry.
        title: of the paper.
        author: as BibTeX writes authors; empty where they are not known.
    """
    fields = {"title": title, "author": author, "eprint": number, "archivePrefix": "arXiv"}
    lines = [f"  {name:<13} = {{{value}}}," for name, value in fields.items() if value]
    bibtex = "\n".join([f"@misc{{{key},", *lines, "}"])
    return Paper(f"arXiv:{number}", f"https://arxiv.org/abs/{number}", bibtex)
