"""The documentation says of a setting what its metadata say, as the command line does."""

from __future__ import annotations

import re
from dataclasses import fields
from functools import cache

import pytest
from support.lora_files import ROOT

import klora_compile
import klora_runtime
from klora_compile import export, rules, searching, sweeping
from klora_compile.fields import setting_of
from klora_compile.rules.est import Est
from klora_compile.rules.klora import Klora
from klora_compile.rules.np_klora import NpKlora
from klora_compile.settings.read_options import ReadOptions
from klora_compile.settings.shared import Settings

griffe = pytest.importorskip("griffe")


@cache
def documented(kind: type) -> dict[str, str]:
    """Field -> what the documentation says of it."""
    extension = griffe.load_extensions(f"{ROOT / 'docs' / 'settings.py'}:SettingDocs")
    folders = [ROOT, ROOT / "runtime"]
    package = griffe.load("klora_compile", extensions=extension, search_paths=folders)
    found = package[f"{kind.__module__}.{kind.__qualname__}".removeprefix("klora_compile.")]
    members = {**found.inherited_members, **found.members}
    return {each.name: members[each.name].docstring.value for each in fields(kind)}


@pytest.mark.parametrize("kind", [Klora, NpKlora, Settings, ReadOptions])
def test_every_setting_is_documented(kind: type) -> None:
    texts = documented(kind)
    for each in fields(kind):
        assert texts[each.name].startswith(setting_of(each).help)


def test_range_default_and_what_the_field_adds_follow() -> None:
    assert documented(Klora)["alpha"].endswith("Range: -100 to 100. Default: 1.5.")
    assert documented(Klora)["top_k"].endswith("Range: 1 or more. None: auto.")
    help_text = (
        "Discrepancy of the style; higher favours content. Range: 0 to 2. One minus a cosine."
    )
    assert documented(Est)["d"].startswith(help_text)


def test_the_reference_shows_every_public_name() -> None:
    extension = griffe.load_extensions(f"{ROOT / 'docs' / 'settings.py'}:PublicRules")
    folders = [ROOT, ROOT / "runtime"]
    package = griffe.load("klora_compile", extensions=extension, search_paths=folders)
    rooms = {
        "": klora_compile,
        "rules": rules,
        "export": export,
        "searching": searching,
        "sweeping": sweeping,
    }
    for path, module in rooms.items():
        assert sorted((package[path] if path else package).exports) == sorted(module.__all__)
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    own = [".".join(filter(None, ("klora_compile", room))) for room in rooms]
    for name in (*own, "klora_runtime"):
        assert f"\n## {name}\n" in page
        assert f"\n::: {name}\n" in page
    elsewhere = {name for name in package.exports if "klora_runtime" in package[name].target_path}
    shown = set(re.findall(r"^::: klora_runtime\.errors\.(\w+)", page, re.MULTILINE))
    assert elsewhere - set(klora_runtime.__all__) == shown
