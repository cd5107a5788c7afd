"""Facts of a base model are in its file: no other file knows a base model by name."""

from __future__ import annotations

import functools
import io
import re
import shutil
import tokenize
from pathlib import Path

import pytest
from support.lora_files import ROOT, random_pair, run_python, write_lora

from klora_runtime.families import catalogue
from klora_runtime.families.catalogue import FAMILIES

RECORDS = ROOT / "runtime" / "klora_runtime" / "families"
PACKAGES = (ROOT / "klora_compile", ROOT / "runtime" / "klora_runtime")
SOURCES = {path: path.read_text() for folder in PACKAGES for path in sorted(folder.rglob("*.py"))}

#: Key -> the file of its record, without its ending.
FILE_OF = dict(zip(FAMILIES, catalogue._FILES, strict=True))


@functools.cache
def code(source: str) -> tuple[tuple[str, str], ...]:
    """Kind and text of what a file says: its names, strings and comments, each once."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    said = ((tokenize.tok_name[token.type], token.string) for token in tokens)
    wanted = ("NAME", "STRING", "COMMENT", "FSTRING_MIDDLE")
    return tuple(dict.fromkeys(each for each in said if each[0] in wanted))


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


RECORD = '''
"""A base model of tomorrow, in the names of its authors."""

from __future__ import annotations

from klora_runtime.families.family import MUSUBI_TUNER, Family, Kohya, Mark, Script
from klora_runtime.families.rows import Layout, Row, renamed, thirds

_QKV = tuple(f"units.{{}}.attn.{name}" for name in ("to_q", "to_k", "to_v"))
AUTHORS = Layout(
    "morrow",
    "tomorrow",
    "transformer",
    (
        Row("stack.{}.qkv", _QKV, thirds),
        *renamed("stack.{}", "units.{}", {"up": "ff.net.0.proj", "down": "ff.net.2"}),
    ),
)

FAMILY = Family(
    key="tomorrow",
    title="Tomorrow 1",
    pipeline="TomorrowPipeline",
    hub="authors/tomorrow",
    models=("TomorrowTransformer",),
    layouts=(AUTHORS,),
    blocks={"units": 7},
    marks=(Mark(r"^units\\.\\d+\\.attn\\.to_[qkv]$", (24,)),),
    stated=r"tomorrow",
    script=Script("networks.lora_tomorrow", MUSUBI_TUNER),
    kohya=Kohya((AUTHORS,), {"modelspec.architecture": "Tomorrow/lora"}),
    missing={
        "tag": "diffusers has no trainer for it",
        "text_encoders": "none of the trainers whose files klora reads adapts its own",
    },
)
'''

USE = """
import json
import sys
from click.testing import CliRunner
from klora_compile.cli import main

def klora(*arguments):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result.output

folder = sys.argv[1]
content, style, artifact, lora = (
    f"{folder}/{name}.safetensors" for name in ("1", "2", "a.klora", "lora"))
klora("compile", content, style, "-o", artifact, "--no-cache")
facts = json.loads(klora("inspect", artifact, "--json"))
assert facts["family"] == "tomorrow", facts["family"]
assert "transformer.units.0" in klora("inspect", artifact)
card = klora("card", artifact, "-o", "-")
assert "from diffusers import TomorrowPipeline" in card
assert "Tomorrow 1: any model" in card
assert "such as `authors/tomorrow`" in card
klora("export", artifact, "--static", "-o", lora)
facts = json.loads(klora("inspect", lora, "--json"))
assert (facts["family"], facts["layout"], facts["names"]) == ("tomorrow", "kohya", "morrow")
assert facts["trainer"] == "klora"
"""


def test_one_file_and_one_line_add_a_base_model(tmp_path: Path) -> None:
    """In a copy of the runtime: reading, report, card and export know it."""
    runtime = tmp_path / "product" / "klora_runtime"
    shutil.copytree(ROOT / "runtime" / "klora_runtime", runtime)
    (runtime / "families" / "tomorrow.py").write_text(RECORD.lstrip())
    assert len(RECORD.splitlines()) <= 40
    catalogue = runtime / "families" / "catalogue.py"
    catalogue.write_text(catalogue.read_text().replace("_FILES = (", '_FILES = (\n    "tomorrow",'))
    for seed in (1, 2):
        shapes = {"qkv": (72, 24), "up": (96, 24), "down": (24, 96)}
        tensors = {}
        for name, (out, inner) in shapes.items():
            down, up = random_pair(out, inner, 2, seed=seed)
            tensors[f"diffusion_model.stack.0.{name}.lora_A.weight"] = down
            tensors[f"diffusion_model.stack.0.{name}.lora_B.weight"] = up
        write_lora(tmp_path / f"{seed}.safetensors", tensors)
    code = f"import sys; sys.path.insert(0, {str(runtime.parent)!r})\n{USE}"
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
