"""Catalogues that somebody altered: one clear error, whatever was changed, and nothing linked."""

from __future__ import annotations

import base64
import gc
import hashlib
import json
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support.lora_files import METADATA, canonical, inflated, read_raw, write_raw
from support.many_loras import write_many

from klora_compile.cataloguing.building import Selection, build, draft
from klora_compile.cataloguing.selecting import loras_of
from klora_compile.profiles.gathering import gather
from klora_compile.profiles.store import Store
from klora_compile.settings.config import Config
from klora_compile.settings.read_options import ReadOptions
from klora_runtime import ArtifactError, Catalogue, FusionLibrary
from klora_runtime.errors import ConfigError, KloraError

KEY = "klora_catalogue"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("hostile")
    files, store = write_many(found / "loras", 4), Store(found / "store")
    gather(files, store, options=ReadOptions(), device="cpu", engine=None)
    loras = loras_of(store.profiles())
    selection = Selection(loras[:2], loras[2:], {})
    build(draft(store, selection, Config()), found / "whole.safetensors")
    return found


def altered(folder: Path, change: Change, path: Path, *, digest: str | None = None) -> Path:
    """A catalogue with another JSON and the digest that belongs to it."""
    header, data = read_raw(folder / "whole.safetensors")
    value = json.loads(inflated(header[METADATA][KEY]))["catalogue"]
    change(value)
    inner = canonical(value)
    stated = digest or hashlib.sha256(inner.encode()).hexdigest()
    text = f'{{"catalogue":{inner},"digest":"{stated}"}}'
    packed = base64.b64encode(zlib.compress(text.encode(), 9)).decode()
    header[METADATA] = {KEY: f"deflate:{packed}"}
    raw = json.dumps(header).encode()
    return write_raw(path, raw + b" " * (-len(raw) % 8), data)


def put(*path: Any) -> Change:
    """Put the last argument where the others lead."""

    def run(value: dict[str, Any]) -> None:
        *way, last, new = path
        place: Any = value
        for step in way:
            place = place[step]
        place[last] = new

    return run


CHANGES: dict[str, tuple[Change, str]] = {
    "no object": (lambda v: v.clear(), "expected an object with a format"),
    "another format": (put("format", "name", "klora-fusion"), "expected klora-catalogue"),
    "a later version": (put("format", "version", 2), "this klora reads version 1"),
    "a key too many": (put("extra", 1), "expected the keys"),
    "a key too few": (lambda v: v.pop("kinds"), "expected the keys"),
    "terms": (put("terms", []), "terms: expected the keys"),
    "a pattern": (put("terms", "duel", "inequality", "pattern", "x"), "pattern: found x"),
    "alpha": (put("terms", "duel", "inequality", "alpha", 1e9), "alpha: found"),
    "a gamma": (put("terms", "duel", "gamma", -1), "gamma: found -1"),
    "a clock": (put("terms", "clock", "sun"), "clock: found sun"),
    "weights": (put("terms", "weights", {"content": "1"}), "weights: found"),
    "a table": (put("tables", 0, 0, 3, [0, 4]), "expected [component, module"),
    "a module": (put("tables", 0, 0, 1, "a..b"), "expected [component, module"),
    "an order": (lambda v: v["tables"][0].reverse(), "not sorted"),
    "a layer twice": (lambda v: v["tables"][0].insert(0, v["tables"][0][0]), "not sorted"),
    "ranks": (put("ranks", 0, 0, -1), "expected ranks"),
    "too few ranks": (lambda v: v["ranks"][0].pop(), "its ranks are not"),
    "keys": (put("keys", 0, 0, 3, [[3, 1]]), "expected [half, down, up, rows]"),
    "a half": (put("keys", 0, 0, 0, "low"), "its keys are not"),
    "a table that is not there": (put("loras", 0, "table", 99), "table: found 99"),
    "a name": (put("loras", 0, "name", ""), "name: found"),
    "one name twice": (lambda v: put("loras", 1, "name", v["loras"][0]["name"])(v), "one name"),
    "a path": (put("loras", 0, "sources", "whole", "file", "../x"), "sources: found"),
    "no digest": (put("loras", 0, "digest", "abc"), "digest: found abc"),
    "partners": (put("loras", 0, "partners", [3, 2]), "partners: found"),
    "fewer sums": (lambda v: v["loras"][0]["partners"].pop(), "expected a tensor F64"),
    "a content": (put("contents", 0, 77), "contents: expected ascending"),
    "always": (put("always", {"content": 0}), "always: expected names"),
    "a kind": (put("kinds", 0, {}), "kinds.0: expected refused"),
    "components": (lambda v: v["components"].append("vae"), "gamma: expected a tensor"),
    "a control character": (put("tool", "\x1b[2J" * 3 + "x"), ""),
}


@pytest.mark.parametrize("case", CHANGES)
def test_every_part_is_checked(case: str, folder: Path, tmp_path: Path) -> None:
    change, message = CHANGES[case]
    path = altered(folder, change, tmp_path / "altered.safetensors")
    if not message:
        assert Catalogue.open(path)
        return
    with pytest.raises(ArtifactError) as error:
        Catalogue.open(path)
    assert message in str(error.value)
    assert "\x1b" not in str(error.value)


def read_all(path: Path) -> None:
    catalogue = Catalogue.open(path)
    for number in range(len(catalogue.opened.document.loras)):
        catalogue.opened.file.numbers(number)


def test_altered_json_and_numbers_are_seen_by_their_digests(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "altered.safetensors"
    altered(folder, put("tool", "x"), path, digest="0" * 64)
    with pytest.raises(ArtifactError, match="its digest differs"):
        Catalogue.open(path)
    whole = (folder / "whole.safetensors").read_bytes()
    header, data = read_raw(folder / "whole.safetensors")
    begin = len(whole) - len(data)
    for name, info in header.items():
        if name == METADATA:
            continue
        changed = bytearray(whole)
        changed[begin + info["data_offsets"][0]] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ArtifactError, match=f"its tensor {name} was altered"):
            read_all(path)


def test_a_text_that_grows_without_end_is_cut(folder: Path, tmp_path: Path) -> None:
    header, data = read_raw(folder / "whole.safetensors")
    bomb = base64.b64encode(zlib.compress(b" " * 300_000_000, 9)).decode()
    header[METADATA] = {KEY: f"deflate:{bomb}"}
    path = write_raw(tmp_path / "bomb.safetensors", header, data)
    with pytest.raises(ArtifactError, match="longer than 268435456 bytes"):
        Catalogue.open(path)


def test_random_changes_give_one_error_or_nothing(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "whole.safetensors").read_bytes()
    expected = Catalogue.open(folder / "whole.safetensors").fusion("0-000", "0-002")
    path = tmp_path / "changed.safetensors"
    for number in range(60):
        random, data = Random(number), bytearray(whole)
        for _ in range(random.choice((1, 3, 50))):
            data[random.randrange(len(data))] = random.randrange(256)
        path.write_bytes(data[: random.choice((len(data), random.randrange(len(data)))) or 1])
        try:
            found = Catalogue.open(path).fusion("0-000", "0-002")
        except ArtifactError:
            continue
        assert found.entries == expected.entries


def test_another_file_is_no_catalogue(folder: Path, tmp_path: Path) -> None:
    lora = next((folder / "loras").iterdir())
    with pytest.raises(ArtifactError, match="is no catalogue: expected exactly the metadata key"):
        Catalogue.open(lora)
    with pytest.raises(ArtifactError, match="No such file"):
        Catalogue.open(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"loras: .* is not a folder"):
        Catalogue.open(folder / "whole.safetensors", loras=lora)


def test_unknown_names_and_missing_loras_are_said(folder: Path, tmp_path: Path) -> None:
    catalogue = Catalogue.open(folder / "whole.safetensors", loras=tmp_path)
    with pytest.raises(ConfigError, match="no content nobody; the catalogue has 0-000, 0-001"):
        catalogue.fusion("nobody", "0-002")
    with pytest.raises(ArtifactError, match="no file there has that digest"):
        catalogue.fusion("0-000", "0-002")
    with pytest.raises(ConfigError, match="without LoRAs"):
        Catalogue.open(folder / "whole.safetensors").opened.read(0)


def test_a_catalogue_alone_keeps_no_factors(folder: Path) -> None:
    catalogue = Catalogue.open(folder / "whole.safetensors", loras=folder / "loras")

    def a_delta() -> weakref.ref[object]:
        entry = catalogue.fusion("0-000", "0-002").entries[-1]
        return weakref.ref(next(iter(entry.factors.values())).delta)

    found = a_delta()
    gc.collect()
    assert found() is None


def test_a_library_keeps_the_factors_of_each_lora_once(folder: Path) -> None:
    catalogue = Catalogue.open(folder / "whole.safetensors", loras=folder / "loras")
    library = FusionLibrary(2**20, catalogue=catalogue)
    one, other = library.pair("0-000", "0-002"), library.pair("0-000", "0-003")
    assert len(library) == 3
    assert 0 < library.nbytes < one.nbytes + other.nbytes
    layer = one.entries[-1].layer
    parts = [
        entry.factors["content"].delta
        for fusion in (one, other)
        for entry in fusion.entries
        if entry.layer == layer
    ]
    assert parts[0] is parts[1]
    small = FusionLibrary(library.nbytes // 2, catalogue=catalogue)
    for style in ("0-002", "0-003", "0-002"):
        small.pair("0-000", style)
        assert small.nbytes <= small.budget
    with pytest.raises(KloraError, match="the library has no catalogue"):
        FusionLibrary(1).pair("0-000", "0-002")
