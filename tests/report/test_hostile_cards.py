"""Text from an artifact cannot act in a model card: neither as YAML nor as Markdown nor as HTML."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
from support.cards import card_of, rows, section, split, tokens
from support.lora_files import Artifact

from klora_compile.report.markdown import fenced, plain, printable
from klora_runtime.__about__ import INSTALL, INSTALL_RUNTIME, REPOSITORY

HOSTILE = (
    "| a |\n---\nlicense: mit\n# Owned\n\x1b[31m`code` ```\n<script>alert(1)</script> "
    "[x](https://evil.example) ![p](//evil) www.evil.example a@evil.example *b* __c__ ~~d~~ "
    "&lt; \\( x \\) $$x$$ {{y}} \u202e \u2028 !!python/object \"' end"
)


def hostile_artifact(stated_artifact: Path, tmp_path: Path) -> Path:
    """Every text that the format leaves free, made hostile."""
    changed = Artifact.read(stated_artifact)
    document = changed.document
    document["tool"] = document["fits"]["family"] = HOSTILE
    document["rule"]["parameters"] = {HOSTILE: HOSTILE, "pattern": HOSTILE}
    document["rule"]["derived"] = {"gamma": {HOSTILE: 1.0, "unet": 2.0}}
    for source in document["sources"].values():
        free = HOSTILE.replace("/", "∕").replace("\\", "∖")
        source |= {"file": free, "layout": HOSTILE, "license": HOSTILE, "trigger_words": [HOSTILE]}
    document["sources"] = {f"{HOSTILE}{n}": s for n, s in enumerate(document["sources"].values())}
    for slot, name in zip(document["slots"].values(), document["sources"], strict=True):
        slot["sources"] = [name]
    return changed.write(tmp_path / "`x` <b>|--- [y](z).klora.safetensors")


def test_hostile_text_is_only_text(stated_artifact: Path, tmp_path: Path) -> None:
    hostile = hostile_artifact(stated_artifact, tmp_path)
    card = card_of(hostile)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]", card)
    front, body = split(card)
    assert set(front) == {
        *("library_name", "pipeline_tag", "tags"),
        *("instance_prompt", "license", "license_name"),
    }
    assert front["instance_prompt"] == printable(HOSTILE)
    assert re.fullmatch(r"[a-z0-9.-]+", front["license_name"])
    assert "## File" in body
    seen = tokens(body)
    assert {token.type for token in seen} <= {
        *("heading_open", "heading_close", "paragraph_open", "paragraph_close", "inline", "text"),
        *("table_open", "table_close", "thead_open", "thead_close", "tbody_open", "tbody_close"),
        *("tr_open", "tr_close", "th_open", "th_close", "td_open", "td_close", "text_special"),
        *("fence", "code_inline", "link_open", "link_close", "softbreak"),
    }
    links = [token.attrs["href"] for token in seen if token.type == "link_open"]
    assert set(links) - {REPOSITORY} == {"https://arxiv.org/abs/2502.18461", "#how-to-load"}
    headings = [seen[i + 1].content for i, t in enumerate(seen) if t.type == "heading_open"]
    assert headings[1:] == [
        *("Base model", "Sources", "Schedule", "How to load", "File", "Citation")
    ]
    assert [token.info for token in seen if token.type == "fence"] == [
        *("text", "sh", "python", "sh", "sh", "bibtex")
    ]
    sources = rows(section(body, "Sources"))
    assert [len(line) for line in sources] == [8, 8, 8]
    assert sources[1][5] == printable(HOSTILE)
    assert dict(rows(section(body, "File")))["Written by"] == printable(HOSTILE)
    assert dict(rows(section(body, "File")))["Name"] == hostile.name
    (code,) = [token.content for token in seen if token.info == "python"]
    strings = [n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant)]
    assert {hostile.name, printable(HOSTILE)} <= set(strings)
    runtime, install, line = [token.content for token in seen if token.info == "sh"]
    assert (runtime, install) == (f"{INSTALL_RUNTIME}\n", f"{INSTALL}\n")
    assert shlex.split(line)[:3] == ["klora", "sample", hostile.name]
    assert len(shlex.split(line)) == 9


@pytest.mark.parametrize(
    "text",
    [
        *("a|b", "`a`", "<b>a</b>", "[a](b)", "![a](b)", "<https://a.b>", "*a*", "_a_", "**a**"),
        *("a\\", "\\|", "&amp;", "# a", "a<!-- b", "https://a.b", "www.a.b", "a@b.c", "$$a$$"),
        *("~~a~~", "a_b_c", "__init__", "{a}", "\\(a\\)", "日本語 ~ é"),
    ],
)
def test_plain_text_is_shown_as_it_is(text: str) -> None:
    seen = tokens(f"a {plain(text)}")
    assert {t.type for t in seen} <= {
        *("paragraph_open", "paragraph_close", "inline", "text", "text_special")
    }
    assert "".join(t.content for t in seen if t.type in ("text", "text_special")) == f"a {text}"
    assert not re.search(r"(?i)https?://|www\.|\S@\S|\$\$|\\", plain(text))


def test_common_names_stay_readable_in_the_file() -> None:
    for name in ("sks_fox_v2.safetensors", "CreativeML Open RAIL++-M (2022), p. 5"):
        assert plain(name) == name


def test_a_fence_is_longer_than_any_in_its_text() -> None:
    (token,) = tokens(fenced("a\n````\nb", "text"))
    assert (token.type, token.content) == ("fence", "a\n````\nb\n")
