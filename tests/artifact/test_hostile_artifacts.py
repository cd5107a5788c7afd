"""Artifacts whose JSON lies: every rule of FORMAT.md broken once, the digest made right again."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.golden_fusion import ATTENTION
from support.lora_files import GOLDEN, Artifact

from klora_runtime import load_fusion
from klora_runtime.artifact import checks
from klora_runtime.artifact.document import load_document
from klora_runtime.errors import ArtifactError

#: Digest of a fusion that is null.
NULL = hashlib.sha256(b"null").hexdigest()

EVIL = "\x1b[2J\x07\r\nall is well\u202e"

Change = Callable[[dict[str, Any]], object]


def refusal(path: Path, check: Any = "structure") -> ArtifactError:
    """Of the reader with numbers, and if it needs none of them of the one without."""
    with pytest.raises(ArtifactError) as caught:
        load_fusion(path, check=check)
    if check == "structure":
        with pytest.raises(ArtifactError) as without_torch:
            load_document(path)
        assert str(without_torch.value) == str(caught.value)
        assert without_torch.value.issues == caught.value.issues
    text = str(caught.value)
    assert all(c.isprintable() or c == "\n" for c in text), text
    assert "all is well" not in text.splitlines()
    return caught.value


def query(document: dict[str, Any]) -> dict[str, Any]:
    """The entry that switches."""
    entry: dict[str, Any] = document["entries"][4]
    assert entry["fate"] == "switching"
    return entry


def put(*path: Any) -> Change:
    """Sets the last of ``path`` at the place named before it: ``put("fits", "family", 3)``."""

    def change(document: dict[str, Any]) -> None:
        place: Any = document
        for step in path[:-2]:
            place = place[step]
        place[path[-2]] = path[-1]

    return change


def drop(*path: Any) -> Change:
    """Deletes what the last of ``path`` names."""

    def change(document: dict[str, Any]) -> None:
        place: Any = document
        for step in path[:-1]:
            place = place[step]
        del place[path[-1]]

    return change


ENTRY = ("entries", 4)
CONTENT = (*ENTRY, "factors", "content")
TIMELINE = (*ENTRY, "timeline")

#: What is done to the document, and the characteristic part of the one issue it gives.
CASES: dict[str, tuple[Change, str]] = {
    # format
    "newer version": (
        put("format", "version", 2),
        "format.version: this klora reads up to version 1, the file has 2; update klora",
    ),
    "version 0": (put("format", "version", 0), "format.version: expected a whole number, found 0"),
    "version true": (put("format", "version", True), "format.version: expected a whole number"),
    "version 1.0": (put("format", "version", 1.0), "format.version: expected a whole number"),
    "other format": (put("format", "name", "x"), "format.name: expected klora-fusion, found x"),
    "format no object": (put("format", 1), "format: expected an object, found 1"),
    # keys
    "key missing": (drop("fits"), "fusion: lacks fits"),
    "key unknown": (put("gates", []), "fusion: has unknown keys gates; update klora"),
    "entry key unknown": (put(*ENTRY, "gate", 1), r"entries[4]: has unknown keys gate; update"),
    "entry key missing": (drop(*ENTRY, "fate"), "entries[4]: lacks fate"),
    "factor key unknown": (put(*CONTENT, "mask", 1), "factors.content: has unknown keys mask; upd"),
    "factor key missing": (drop(*CONTENT, "scale"), "factors.content: lacks scale"),
    "slot key unknown": (put("slots", "style", "x", 1), "slots.style: has unknown keys x; update"),
    "segment key unknown": (put(*TIMELINE, 0, "x", 1), "timeline[0]: has unknown keys x; update"),
    "segment key missing": (drop(*TIMELINE, 1, "style"), "timeline[1]: lacks style"),
    "fits key unknown": (put("fits", "x", 1), "fits: has unknown keys x; update klora"),
    "rule key unknown": (put("rule", "x", 1), "rule: has unknown keys x; update klora"),
    "evil key": (put(EVIL, 1), r"fusion: has unknown keys \x1b[2J\x07\r\nall is well\u202e;"),
    # provenance
    "tool no string": (put("tool", 1), "tool: expected a string"),
    "rule no object": (put("rule", []), "rule: expected an object, found []"),
    "parameters no object": (put("rule", "parameters", 1), "rule.parameters: expected an object"),
    "sources empty": (put("sources", {}), "sources: expected an object of 1 to 64 sources"),
    "source with folder": (
        put("sources", "style", "file", "../../x.safetensors"),
        "sources.style.file: missing or invalid: ../../x.safetensors",
    ),
    "source with backslash": (put("sources", "style", "file", "a\\b"), "sources.style.file: miss"),
    "source without hash": (drop("sources", "style", "sha256"), "sources.style.sha256: missing or"),
    "source with bad hash": (put("sources", "style", "sha256", "A" * 64), "sources.style.sha256:"),
    "source size negative": (put("sources", "style", "bytes", -1), "sources.style.bytes: missing"),
    "source rank 0": (put("sources", "style", "ranks", [0]), "sources.style.ranks: missing or inv"),
    "words of numbers": (put("sources", "style", "trigger_words", [1]), "trigger_words: missing"),
    "licence no string": (put("sources", "style", "license", 1), "sources.style.license: missing"),
    "scores no object": (put(*ENTRY, "scores", []), "scores: expected rules with numbers"),
    # slots
    "slots empty": (put("slots", {}), "slots: expected an object of 1 to 64 slots"),
    "slot name from": (put("slots", "from", {}), "slots.from: not a slot name"),
    "slot name evil": (put("slots", EVIL, {}), r"slots.\x1b[2J\x07\r\nall is well\u202e: not a"),
    "slot name with path": (put("slots", "../x", {}), "slots.../x: not a slot name"),
    "role unknown": (
        put("slots", "style", "role", "mood"),
        "slots.style.role: expected content, style, merged or always, found mood",
    ),
    "slot without source": (put("slots", "style", "sources", []), "sources: names no known source"),
    "slot of no source": (
        put("slots", "style", "sources", ["x"]),
        "sources: names no known source",
    ),
    "slot of objects": (put("slots", "style", "sources", [{}]), "sources: names no known source"),
    "derived no string": (
        put("slots", "style", "derived", 1),
        "derived: expected a string or null",
    ),
    # entries
    "entries empty": (put("entries", []), "entries: expected a list of 1 to 20000 entries"),
    "entries no list": (put("entries", {}), "entries: expected a list of 1 to 20000 entries"),
    "entry no object": (put("entries", 4, 1), "entries[4]: expected an object, found 1"),
    "entry twice": (
        lambda d: d["entries"].insert(4, copy.deepcopy(d["entries"][4])),
        "entries[5]: unet." + ATTENTION + ".to_q.weight is a duplicate or out of order",
    ),
    "entries unsorted": (
        lambda d: d["entries"].insert(0, d["entries"].pop(4)),
        "entries[1]: text_encoder.encoder.layers.0.mlp.fc1.weight is a duplicate or out of order",
    ),
    "component with dots": (put(*ENTRY, "component", ".."), "component: not a component name: .."),
    "component dunder": (put(*ENTRY, "component", "__class__"), "not a component name: __class__"),
    "component with newline": (put(*ENTRY, "component", "unet\n"), r"component name: unet\n"),
    "module upwards": (put(*ENTRY, "module", "../../etc"), "module: not a module path: ../../etc"),
    "module with slash": (put(*ENTRY, "module", "a/b"), "module: not a module path: a/b"),
    "module with newline": (put(*ENTRY, "module", "a.b\n"), r"module: not a module path: a.b\n"),
    "module evil": (put(*ENTRY, "module", EVIL), r"not a module path: \x1b[2J\x07\r\nall is well"),
    "module empty": (put(*ENTRY, "module", ""), "module: not a module path: "),
    "module two dots": (put(*ENTRY, "module", "a..b"), "module: not a module path: a..b"),
    "module deep": (put(*ENTRY, "module", ".".join("a" * 33)), "module: not a module path: a.a.a"),
    "module no string": (put(*ENTRY, "module", ["a"]), "module: not a module path: ['a']"),
    "parameter another": (put(*ENTRY, "parameter", "data"), "does not match the entries"),
    "parameter no name": (put(*ENTRY, "parameter", "a.b"), "not a parameter's name: a.b"),
    "parameter no string": (put(*ENTRY, "parameter", []), "not a parameter's name: []"),
    "shape empty": (put(*ENTRY, "shape", []), "shape: not a shape: []"),
    "shape with zero": (put(*ENTRY, "shape", [3, 0]), "shape: not a shape: [3, 0]"),
    "shape of floats": (put(*ENTRY, "shape", [3.0, 4]), "shape: not a shape: [3.0, 4]"),
    "shape giant": (put(*ENTRY, "shape", [3, 2**31]), "shape: not a shape: [3, 2147483648]"),
    "fate no word": (put(*ENTRY, "fate", "\x1b[31m"), "fate: not a few lower-case words"),
    "fate no string": (put(*ENTRY, "fate", {}), "fate: not a few lower-case words: {}"),
    "fate says nothing acts": (put(*ENTRY, "fate", "zero"), "fate: zero, but 2 slots are stored"),
    "scores no numbers": (put(*ENTRY, "scores", {"klora": {"k": "9"}}), "scores: expected rules"),
    "scores a list": (put(*ENTRY, "scores", {"klora": [1]}), "scores: expected rules"),
    "rule name no word": (put("rule", "name", "\x1b]0;x"), "rule.name: not a rule's name"),
    "rule parameters deep": (put("rule", "parameters", {"a": [1]}), "rule.parameters: expected"),
    # factors
    "kind unknown": (
        put(*CONTENT, "kind", "rows"),
        "factors.content: unknown kind rows; update kl",
    ),
    "kind no string": (put(*CONTENT, "kind", []), "factors.content: unknown kind []; update klora"),
    "encoding unknown": (put(*CONTENT, "encoding", "q8"), "unknown encoding q8; update klora"),
    "factors no object": (put(*ENTRY, "factors", []), "factors: expected an object"),
    "factor no object": (put(*CONTENT, []), "factors.content: expected an object"),
    "factor of no slot": (
        lambda d: query(d)["factors"].update({"mood": query(d)["factors"]["content"]}),
        "factors.mood: is not in slots",
    ),
    "scale too large": (put(*CONTENT, "scale", 1e38), "scale: not a number: 1e+38"),
    "scale giant": (put(*CONTENT, "scale", 10**400), "scale: not a number: 1000"),
    "scale true": (put(*CONTENT, "scale", True), "scale: not a number: True"),
    "scale string": (put(*CONTENT, "scale", "1"), "scale: not a number: 1"),
    "tensor missing": (put(*CONTENT, "down", "0" * 32), "down: no tensor 0000"),
    "tensor no string": (put(*CONTENT, "down", ["a"]), "down: no tensor ['a'] in the file"),
    "shapes differ": (
        put(*ENTRY, "shape", [3, 5]),
        "factors.content: down [1, 4] and up [3, 1] do not make [3, 5]",
    ),
    "factors exchanged": (
        lambda d: query(d)["factors"]["content"].update(
            down=query(d)["factors"]["content"]["up"], up=query(d)["factors"]["content"]["down"]
        ),
        "factors.content: down [3, 1] and up [1, 4] do not make [3, 4]",
    ),
    "up of other rows": (put(*ENTRY, "shape", [5, 4]), "down [1, 4] and up [3, 1] do not make [5"),
    "vector": (put(*ENTRY, "shape", [4]), "down [1, 4] and up [3, 1] do not make [4]"),
    # timeline
    "timeline empty": (put(*TIMELINE, []), "timeline: expected a list of 1 to 4096 segments"),
    "timeline no list": (put(*TIMELINE, {}), "timeline: expected a list of 1 to 4096 segments"),
    "starts late": (
        put(*TIMELINE, 0, "from", 0.1),
        "timeline[0].from: the first segment must start at 0, found 0.1",
    ),
    "unsorted": (
        lambda d: query(d)["timeline"].append({"from": 0.25, "content": 1.0, "style": 0.0}),
        "timeline[2].from: not an ascending progress in [0, 1): 0.25",
    ),
    "start twice": (put(*TIMELINE, 1, "from", 0.0), "timeline[1].from: not an ascending progress"),
    "start at 1": (put(*TIMELINE, 1, "from", 1.0), "not an ascending progress in [0, 1): 1.0"),
    "start below 0": (put(*TIMELINE, 0, "from", -0.5), "not an ascending progress in [0, 1): -0.5"),
    "start null": (put(*TIMELINE, 0, "from", None), "not an ascending progress in [0, 1): None"),
    "start true": (put(*TIMELINE, 1, "from", True), "not an ascending progress in [0, 1): True"),
    "coefficient large": (put(*TIMELINE, 0, "content", 1e39), "content: not a number: 1e+39"),
    "coefficient string": (put(*TIMELINE, 0, "content", "1"), "content: not a number: 1"),
    "coefficient null": (put(*TIMELINE, 0, "content", None), "content: not a number: None"),
    "coefficient of unknown slot": (put(*TIMELINE, 0, "mood", 1.0), "has unknown keys mood; upd"),
    "coefficient not stored": (
        put("entries", 3, "timeline", 0, "content", 1.0),
        "timeline[0].content: acts, but its factors are not stored",
    ),
    "text encoder that switches": (
        lambda d: d["entries"][0]["timeline"].append({"from": 0.5, "content": 0.0, "style": 0.0}),
        "timeline: the component has no steps: expected one segment",
    ),
    # clock
    "clock of no name": (
        put("clock", "sun"),
        "clock: expected noise, or no key for step, found su",
    ),
    "clock said twice": (put("clock", "step"), "clock: expected noise, or no key for step"),
    "clock no string": (put("clock", []), "clock: expected noise, or no key for step, found []"),
    "clock null": (put("clock", None), "clock: expected noise, or no key for step, found None"),
    # fits
    "family no string": (put("fits", "family", 1), "fits.family: expected a string or null"),
    "families unsorted": (
        put("fits", "families", ["sd2", "sd1"]),
        "fits.families: expected two or more sorted strings, and family null",
    ),
    "one family of several": (
        put("fits", "families", ["sd1"]),
        "fits.families: expected two or more sorted strings, and family null",
    ),
    "fingerprint wrong": (put("fits", "fingerprint", "0" * 64), "does not match the entries"),
    "other layer": (put(*ENTRY, "module", f"{ATTENTION}.to_qq"), "does not match the entries"),
    "factors removed": (put(*ENTRY, "factors", {}), "acts, but its factors are not stored"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_rule_is_refused_by_name(case: str, tmp_path: Path) -> None:
    change, issue = CASES[case]
    artifact = Artifact.read()
    change(artifact.document)
    error = refusal(artifact.write(tmp_path / "x.klora.safetensors"))
    assert issue in str(error)
    assert any(issue in one for one in error.issues)
    assert re.search(r"(breaks its format|is not a readable fusion):", str(error))


@pytest.mark.parametrize(
    "change",
    [
        put("sources", "style", "note", "of a later version"),
        put("rule", "parameters", "sharpness", 2.5),
        put("rule", "derived", "discrepancy", {"unet": 0.25}),
        put("rule", "name", "est-lora"),
        put(*ENTRY, "scores", "est-lora", {"energy": {"content": 1.0, "style": None}}),
        put(*ENTRY, "fate", "takes turns"),
    ],
)
def test_provenance_of_other_rules_is_carried(change: Change, tmp_path: Path) -> None:
    artifact = Artifact.read()
    change(artifact.document)
    fusion = load_fusion(artifact.write(tmp_path / "x.klora.safetensors"))
    assert fusion.rule.parameters == artifact.document["rule"]["parameters"]
    assert fusion.rule.derived == artifact.document["rule"]["derived"]
    (entry,) = (e for e in fusion.entries if e.layer == f"unet.{ATTENTION}.to_q")
    assert entry.scores == artifact.document["entries"][4]["scores"]
    assert entry.fate == artifact.document["entries"][4]["fate"]


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    artifact = Artifact.read()
    for change in (put(*CONTENT, "scale", "x"), put(*ENTRY, "scores", 1), put("tool", 1)):
        change(artifact.document)
    for entry in artifact.document["entries"]:
        entry["timeline"][0]["from"] = 2
    error = refusal(artifact.write(tmp_path / "x.klora.safetensors"))
    assert len(error.issues) == 10
    assert "… and 2 more" in str(error)


def test_the_list_of_problems_is_bounded(tmp_path: Path) -> None:
    artifact = Artifact.read()
    artifact.document["entries"] = [0] * 1000
    assert len(refusal(artifact.write(tmp_path / "x.klora.safetensors")).issues) == 50


@pytest.mark.parametrize("limit", ["MAX_ENTRIES", "MAX_SEGMENTS", "MAX_SLOTS"])
def test_limits_are_limits(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"MAX_ENTRIES": 7, "MAX_SEGMENTS": 2, "MAX_SLOTS": 2}
    monkeypatch.setattr(checks, limit, sizes[limit])
    load_fusion(GOLDEN)
    monkeypatch.setattr(checks, limit, sizes[limit] - 1)
    assert f"1 to {sizes[limit] - 1}" in str(refusal(GOLDEN))


# --- the text of the JSON ---------------------------------------------------------------------


def inner_edit(old: str, new: str) -> str:
    """The JSON with ``old`` replaced, under the digest of the changed characters."""
    text = Artifact.read().text()
    assert old in text
    return text.replace(old, new, 1)


TEXTS: dict[str, tuple[Callable[[], str], str]] = {
    "no JSON": (lambda: "klora", "its JSON cannot be read: Expecting value"),
    "empty": (lambda: "", "its JSON cannot be read: Expecting value"),
    "a list": (lambda: "[]", "its JSON needs exactly the keys digest and fusion"),
    "no digest": (lambda: '{"fusion":{}}', "its JSON needs exactly the keys digest and fusion"),
    "a key more": (
        lambda: '{"digest":"","fusion":{},"x":1}',
        "its JSON needs exactly the keys digest and fusion",
    ),
    "no fusion inside": (
        lambda: f'{{"digest":"{NULL}","fusion":null}}',
        "is not a readable fusion:\n  - fusion: expected an object, found None",
    ),
    "a key twice": (
        lambda: '{"digest":"","digest":"","fusion":{}}',
        "the key digest appears twice",
    ),
    "a nested key twice": (
        lambda: inner_edit('"scale":0.5', '"scale":0.5,"scale":0.5'),
        "its JSON cannot be read: the key scale appears twice",
    ),
    "NaN": (lambda: inner_edit('"scale":0.5', '"scale":NaN'), "NaN is not a JSON number"),
    "Infinity": (lambda: inner_edit("0.375", "Infinity"), "Infinity is not a JSON number"),
    "minus Infinity": (lambda: inner_edit("0.375", "-Infinity"), "-Infinity is not a JSON number"),
    "1e400": (
        lambda: inner_edit('"scale":0.5', '"scale":1e400'),
        "its JSON cannot be read: Out of",
    ),
    "5000 digits": (lambda: inner_edit("1234", "1" * 5000), "cannot be read: Exceeds the limit"),
    "deep nesting": (lambda: "[" * 100_000, "cannot be read: maximum recursion depth exceeded"),
    "deep inside": (
        lambda: inner_edit('"l1":20.0', '"l1":' + "[" * 900 + "]" * 900),
        "its JSON was altered",
    ),
    "one number": (
        lambda: inner_edit('"scale":0.5', '"scale":0.75'),
        "its JSON was altered: digest",
    ),
    "one letter": (lambda: inner_edit("ink.safe", "inc.safe"), "its JSON was altered: digest"),
    "digest no string": (lambda: '{"digest":[],"fusion":{}}', "its JSON was altered: digest [] is"),
    "digest upper case": (
        lambda: Artifact.read().text()[:11] + Artifact.read().text()[11:].replace("c", "C", 1),
        "its JSON was altered: digest",
    ),
    "a space": (
        lambda: inner_edit('"scale":0.5', '"scale": 0.5'),
        "its JSON was rewritten: it is n",
    ),
    "other digits": (lambda: inner_edit('"scale":0.5', '"scale":0.50'), "its JSON was rewritten"),
    "other order": (
        lambda: json.dumps(dict(reversed(json.loads(Artifact.read().text()).items()))),
        "its JSON was rewritten: it is not in canonical form (sorted keys, no spaces, ASCII",
    ),
    "not ASCII": (lambda: inner_edit("\\u2713", "✓"), "its JSON was rewritten"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_bad_json_text_is_refused(case: str, tmp_path: Path) -> None:
    make, message = TEXTS[case]
    assert message in str(refusal(Artifact.read().write(tmp_path / "x.safetensors", make())))


def test_each_single_flipped_bit_of_the_json_is_noticed(tmp_path: Path) -> None:
    artifact = Artifact.read()
    text = artifact.text()
    places = range(0, len(text), 37)
    for place in places:
        flipped = chr(ord(text[place]) ^ 1)
        refusal(artifact.write(tmp_path / "x", text[:place] + flipped + text[place + 1 :]))
    assert len(places) > 50
