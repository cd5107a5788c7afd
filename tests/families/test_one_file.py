"""Facts of a base model are in its file: no other file knows a base model by name."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator

import pytest
from support.lora_files import ROOT

from klora_runtime.families import catalogue
from klora_runtime.families.catalogue import FAMILIES

RECORDS = ROOT / "runtime" / "klora_runtime" / "families"
PACKAGES = (ROOT / "klora_compile", ROOT / "runtime" / "klora_runtime")
SOURCES = {
    path: path.read_text()
    for folder in PACKAGES
    for path in sorted(folder.rglob("*.py"))
    if "bench" not in str(path.relative_to(ROOT))
}

#: Key -> the file of its record, without its ending.
FILE_OF = dict(zip(FAMILIES, catalogue._FILES, strict=True))


def code(source: str) -> Iterator[tuple[str, str]]:
    """Kind and text of what a file says: its names, strings and comments."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind in ("NAME", "STRING", "COMMENT", "FSTRING_MIDDLE"):
            yield kind, token.string


def mentions(source: str, key: str) -> list[str]:
    """Where a file says a family by its key, its file or its title."""
    quoted = re.compile(rf"""["'`]({re.escape(key)}|{FILE_OF[key]})["'`]""")
    title = re.compile(rf"(?<!\w){re.escape(FAMILIES[key].title)}(?!\w)")
    return [
        text
        for kind, text in code(source)
        if (kind == "NAME" and text == FILE_OF[key])
        or (kind != "NAME" and (quoted.search(text) or title.search(text)))
    ]


@pytest.mark.parametrize("key", FAMILIES)
def test_only_its_own_file_knows_a_family_by_name(key: str) -> None:
    found = {path: said for path, source in SOURCES.items() if (said := mentions(source, key))}
    assert found.pop(RECORDS / f"{FILE_OF[key]}.py")
    assert found.pop(RECORDS / "catalogue.py") == [f'"{FILE_OF[key]}"']
    others = {path for path in found if path.parent != RECORDS}
    assert not others, {str(path.relative_to(ROOT)): found[path] for path in others}


def quoted(source: str, key: str) -> list[str]:
    """Strings that are a family's key or its file."""
    wanted = {f'"{key}"', f'"{FILE_OF[key]}"'}
    return [text for kind, text in code(source) if kind == "STRING" and text in wanted]


@pytest.mark.parametrize("key", FAMILIES)
def test_records_refer_to_each_other_by_import(key: str) -> None:
    found = {path for path, source in SOURCES.items() if quoted(source, key)}
    assert found == {RECORDS / f"{FILE_OF[key]}.py", RECORDS / "catalogue.py"}


def test_the_search_finds_what_it_is_for() -> None:
    assert mentions("from x import wan", "wan")
    assert mentions("if family == 'wan': pass", "wan")
    assert mentions("# as Wan does", "wan")
    assert mentions('a = f"of {b} for Wan 2.2"', "wan")
    assert not mentions("wanted = 'wander, Wanda'", "wan")
    assert mentions('x = ("flux.1",)', "flux.1")
    assert not mentions("x = 'as FLUX.2 does'", "flux.1")
