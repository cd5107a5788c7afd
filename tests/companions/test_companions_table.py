"""The table of companions in the docs has the rows that are tested, and the versions."""

from __future__ import annotations

from collections.abc import Iterator

from support.companions import COMPANIONS
from support.companions.companion import Companion
from support.lora_files import ROOT
from support.page_table import PageTable, as_text

TABLE = PageTable("companions")


def rows() -> Iterator[str]:
    yield "| companion | of | tested on | `merge` | `branch` |"
    yield "|" + "---|" * 5
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()[1:]
    )
    for each in COMPANIONS:
        library = f"{each.library} {pins[each.library]}"
        yield f"| {each} | {library} | {each.case} | equal | {in_branch(each)} |"


def in_branch(companion: Companion) -> str:
    if companion.after_a_branch is None:
        return "equal"
    return "equal where it is put on before the fusion, else refused by name"


def test_the_table_in_the_docs_is_what_is_tested() -> None:
    """Run this file as a program to write it anew."""
    assert TABLE.read() == as_text(rows())


if __name__ == "__main__":
    TABLE.write(rows())
