"""Every field that ``--json`` prints is documented, and every documented field is printed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from support.hub import Hub
from support.lora_files import ROOT
from support.shipped import Shipped, klora
from tiny_pipeline import tiny_lora

from klora_compile.cli import main

PAGE = (ROOT / "docs" / "reference" / "json.md").read_text()
PAIR = ("fox.safetensors", "ink.safetensors")
TURBO = "turbo.safetensors"
ARTIFACT = "fox-in-ink.klora.safetensors"
BESIDE = ("--always", f"turbo={TURBO}")
PEFT = ("--keys", "peft")
SWEPT = ("--model", "model", "--prompt", "a", "--steps", "1", "--device", "cpu")
SEARCHED = ("--search", "2", "--seed", "0,1", "--judge", "mine.py:even")

#: Kind -> runs that print objects of it, which have each of its fields between them.
RUNS: dict[str, list[tuple[str, ...]]] = {
    "compilation": [
        ("compile", *PAIR, "-o", "whole.klora.safetensors", *BESIDE),
        ("compile", *PAIR, "-o", "tiny.klora.safetensors", "--compress", "0.1", *BESIDE),
        ("compile", *PAIR, "-o", "one.klora.safetensors", "--rule", "ties", *BESIDE),
        ("compile", *PAIR, "-o", "same.klora.safetensors", "--rule", "auto", *BESIDE),
    ],
    "recompilation": [
        ("recompile", "fast.klora.safetensors", "-o", "other.klora.safetensors"),
        ("recompile", "merged.klora.safetensors", "-o", "sum.klora.safetensors"),
        ("recompile", "picked.klora.safetensors", "-o", "again.klora.safetensors"),
    ],
    "fusion": [
        ("inspect", ARTIFACT),
        ("inspect", "small.klora.safetensors"),
        ("inspect", "small.klora.safetensors", "--norms"),
        ("inspect", "thin.klora.safetensors"),
        ("inspect", "merged.klora.safetensors"),
        ("inspect", "picked.klora.safetensors"),
    ],
    "profiles": [("profile", *PAIR, ARTIFACT, "--store", "store")],
    "cache": [("cache", "--info", "--store", "store")],
    "catalogue": [
        ("catalogue", "store", "--content", "fox", "--style", "*", "-o", "all.safetensors"),
        ("catalogue", "store", "--content", "*", "--style", "*", "-o", "a", "--dry-run"),
    ],
    "lora": [("inspect", PAIR[0]), ("inspect", PAIR[0], "--norms")],
    "verification": [("verify", ARTIFACT), ("verify", ARTIFACT, "--against", *PAIR)],
    "signature": [("sign", ARTIFACT, "--key", "author.pem", "--force")],
    "export": [
        ("export", ARTIFACT, "--static", "-o", "lora.safetensors", "--rank", "2", *PEFT),
        ("export", ARTIFACT, "--phases", "2", "-o", "phases", *PEFT),
    ],
    "pictures": [
        ("sample", ARTIFACT, "--model", "model", "--prompt", "a", "--steps", "1", "-o", "a.png")
    ],
    "picture": [("inspect", "made.png")],
    "sweep": [
        ("sweep", *PAIR, *SWEPT, "--rule", "klora,np", "--bias", "0,0.1", "-o", "grid.png"),
        ("sweep", *PAIR, *SWEPT, "--cells", "wrong.json", "-o", "wrong.png"),
    ],
    "search": [
        ("sweep", *PAIR, *SWEPT, *SEARCHED, "--rule", "direct,np", "-o", "best.png"),
        ("sweep", *PAIR, *SWEPT, *SEARCHED, "--cells", "one-wrong.json", "-o", "few.png"),
    ],
    "card": [("card", ARTIFACT, "-o", "README.md")],
    "push": [("push", ARTIFACT, "me/new", "--dry-run")],
    "pull": [("pull", "me/fused", "-o", "pulled.klora.safetensors")],
}
#: Values whose inner names are the rule's or the file's.
OPEN = {
    "derived.{name}",
    "sources.{slot}.notes",
    "layers[].stored.{slot}.rows",
    "truncation_error",
    "rule_settings",
    "cells[].settings",
    "candidates[].settings",
    "plain_sum.settings",
    "check.best.settings",
    "check.plain_sum.settings",
    "phases[].truncation_error",
}


def documented(kind: str) -> set[str]:
    """The fields of one kind, those of the summary among them where it has them."""
    section = PAGE.partition(f"{{ #{kind} }}")[2].partition("\n## ")[0]
    fields = {"schema", "kind"}
    for cell in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE):
        fields |= set(re.findall(r"`([^`]+)`", cell))
    if "[summary]" in section:
        fields |= documented("summary")
    if kind == "fusion":
        shared = (
            *("rule", "gamma", "derived", "family", "families"),
            *("clock", "shifts", "few_steps", "truncations", "near_ties"),
        )
        fields |= {each for each in documented("summary") if each.startswith(shared)}
        compiled = documented("compilation")
        fields |= {each for each in compiled if each.startswith(("thin", "compression"))}
    return fields


def paths(value: Any, path: str = "") -> Iterator[str]:
    """``a.b[].c`` of every value of an object."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from paths(inner, f"{path}\0{name}" if path else name)
    elif isinstance(value, list) and value:
        for inner in value:
            yield from paths(inner, f"{path}[]")
    else:
        yield path + ("[]" if value == [] else "")


def fits(field: str, path: str) -> bool:
    """Whether a path is of a documented field; of an empty list, or of what is open, in part."""
    if field in OPEN and path == field.removesuffix(".{name}").replace(".", "\0"):
        return True  # an empty object
    open_end = "(\0.*)?" if field in OPEN else ""
    shorter = [field[: end.end()] for end in re.finditer(r"\[\]", field)]
    return bool(re.fullmatch(shape(field) + open_end, path)) or (
        path.endswith("[]") and any(re.fullmatch(shape(each), path) for each in shorter)
    )


def shape(field: str) -> str:
    """What the paths of a documented field look like."""
    return re.sub(r"\\\{\w+\\\}", "[^\0]+?", re.escape(field.replace(".", "\0")))


@pytest.fixture(scope="module")
def desk(shipped: Shipped, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("desk")
    for name in (*PAIR, ARTIFACT):
        shutil.copy(shipped.artifact.with_name(name), folder)
    (folder / "model").symlink_to(shipped.model)
    files = [folder / name for name in PAIR]
    pipe = DiffusionPipeline.from_pretrained(shipped.model)
    turbo = tiny_lora(pipe, folder / TURBO, seed=9)
    for name, option in (
        ("small", ("--compress", "0.1")),
        ("thin", ("--thin",)),
        ("fast", ("--always", f"turbo={turbo}")),
        ("merged", ("--rule", "ties", "--always", f"turbo={turbo}")),
        ("picked", ("--rule", "auto", "--always", f"turbo={turbo}")),
    ):
        made = klora("compile", *files, *option, "-o", folder / f"{name}.klora.safetensors")
        assert made.exit_code == 0
    assert klora("profile", *files, folder / ARTIFACT, "--store", folder / "store").exit_code == 1
    fast = folder / "turbo.klora.safetensors"
    assert klora("compile", turbo, "-o", fast).exit_code == 0
    words = ("--model", shipped.model, "--prompt", "a", "--steps", 1, "--weight", "style=0.5")
    words += ("--always", f"turbo={fast}", "--device", "cpu", "-o", folder / "made.png")
    assert klora("sample", folder / ARTIFACT, *words).exit_code == 0
    (folder / "mine.py").write_text("def even(picture, about):\n    return 1.0\n")
    (folder / "one-wrong.json").write_text(
        '[{"rule": "groups", "table": {"content.3 *": "0:1"}}, {"rule": "np"}]'
    )
    (folder / "wrong.json").write_text('[{"rule": "groups", "table": {"content.3 *": "0:1"}}]')
    return folder


def test_every_command_is_documented() -> None:
    documented = {run[0] for runs in RUNS.values() for run in runs}
    pages = {"tune"}  # it serves until it is interrupted, and prints an address alone
    assert documented | pages == set(main.list_commands(None))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", RUNS)
def test_what_is_printed_is_what_is_documented(
    kind: str, desk: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk)
    if kind == "signature":
        pytest.importorskip("model_signing", reason="model-signing is not installed (extra sign)")
        from support.keys import Signer

        Signer.into(desk, "author")
    hub.add("me/fused", {ARTIFACT: Path(ARTIFACT).read_bytes()})
    fields = documented(kind)
    assert len(fields) > 3
    met = set()
    for run in RUNS[kind]:
        printed = json.loads(klora(*run, "--json").stdout)
        assert (printed["schema"], printed["kind"]) == (1, kind)
        for path in paths(printed):
            fitting = {field for field in fields if fits(field, path)}
            assert fitting, path.replace("\0", ".")
            met |= fitting
    assert fields == met
