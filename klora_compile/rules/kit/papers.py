"""Publications of rules, as a model card cites them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A publication."""

    where: str
    """Short citation, as Markdown."""
    link: str
    bibtex: str


def preprint(number: str, key: str, title: str, author: str = "") -> Paper:
    """Return a paper on arXiv.

    Args:
        number: arXiv number, such as ``2402.16843``.
        key: key of the BibTeX entry.
        title: title of the paper.
        author: authors in BibTeX's notation; empty if unknown.
    """
    fields = {"title": title, "author": author, "eprint": number, "archivePrefix": "arXiv"}
    lines = [f"  {name:<13} = {{{value}}}," for name, value in fields.items() if value]
    bibtex = "\n".join([f"@misc{{{key},", *lines, "}"])
    return Paper(f"arXiv:{number}", f"https://arxiv.org/abs/{number}", bibtex)
