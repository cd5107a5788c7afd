"""``klora profile``, ``catalogue`` and ``cache`` as a user calls them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.lora_files import peft_keys, random_pair, read_raw, write_lora
from support.many_loras import BLOCK, write_many

from klora_compile.cli import main
from klora_compile.profiles.store import Store

TO_Q = f"{BLOCK}.attn1.to_q"


def klora(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.output


def told(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(klora(*arguments, "--json"))
    return found


class Studio:
    """Two folders of LoRAs, and a store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.subjects = write_many(folder / "subjects", 3, seed=1)
        self.styles = write_many(folder / "styles", 4, seed=2)
        self.store = folder / "store"
        self.file = folder / "all.klora-catalogue.safetensors"
        klora("profile", *self.subjects, *self.styles, "--store", self.store)

    def build(self, *more: object, subjects: str = "subjects/*", code: int = 0) -> str:
        globs = [self.folder / subjects, self.folder / "styles/*"]
        named = ("--content", globs[0], "--style", globs[1], "-o", self.file)
        return klora("catalogue", self.store, *named, *more, code=code)


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(tmp_path)


def test_from_folders_to_an_artifact_with_the_bytes_of_compile(
    studio: Studio, tmp_path: Path
) -> None:
    assert "12 pairs" in studio.build()
    names = studio.subjects[1].stem, studio.styles[2].stem
    got, expected = tmp_path / "got.klora.safetensors", tmp_path / "compiled.klora.safetensors"
    klora("catalogue", "get", studio.file, *names, "--loras", tmp_path, "-o", got)
    klora("compile", studio.subjects[1], studio.styles[2], "--no-cache", "-o", expected)
    assert got.read_bytes() == expected.read_bytes()
    klora("catalogue", "get", studio.file, *names, "-o", got, "--force")
    pair = studio.subjects[1], studio.styles[2]
    klora("compile", *pair, "--no-cache", "--thin", "--force", "-o", expected)
    assert got.read_bytes() == expected.read_bytes()


def test_list_show_and_check(studio: Studio) -> None:
    studio.build("--table", studio.folder / "pairs.jsonl")
    listed = told("catalogue", "list", studio.file)["loras"]
    assert [each["name"] for each in listed] == sorted(
        path.stem for path in (*studio.subjects, *studio.styles)
    )
    assert {role for each in listed for role in each["roles"]} == {"content", "style"}
    pairs = told("catalogue", "list", studio.file, "--pairs")["pairs"]
    rows = (studio.folder / "pairs.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in rows] == pairs
    assert len(pairs) == 12
    shown = told("catalogue", "show", studio.file, pairs[0]["content"], pairs[0]["style"])
    assert {key: shown[key] for key in pairs[0]} == pairs[0]
    assert sum(shown["layers"].values()) >= 2
    found = told("catalogue", "check", studio.file, "--all", "--loras", studio.folder)
    assert (found["pairs"], found["files"], found["problems"]) == (12, 7, [])
    assert "12 pairs linked again" in klora("catalogue", "check", studio.file, "--all")


def test_a_table_in_parquet_holds_the_same_rows(studio: Studio) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    path = studio.folder / "pairs.parquet"
    studio.build("--table", path)
    schema = parquet.read_table(path).schema
    assert {str(kind) for kind in schema.types} == {"string"}  # no pair has a reason here
    wide = peft_keys({TO_Q: random_pair(6, 9, 1)})
    other = write_lora(studio.folder / "styles" / "wide.safetensors", wide)
    klora("profile", other, "--store", studio.store)
    studio.build("--table", path, "--force")
    table = parquet.read_table(path)
    assert table.schema == schema
    pairs = told("catalogue", "list", studio.file, "--pairs")["pairs"]
    rows = [row | {"gamma": json.loads(row["gamma"])} for row in table.to_pylist()]
    assert rows == pairs
    assert {row["verdict"] for row in rows} == {"linked", "refused"}


def test_parquet_without_its_library_is_refused_before_linking(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    said = studio.build("--table", studio.folder / "pairs.parquet", code=1)
    assert "parquet" in said
    assert not studio.file.exists()


def test_new_loras_are_added_without_linking_old_pairs_again(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio.build()
    old = told("catalogue", "list", studio.file, "--pairs")["pairs"]
    new = write_many(studio.folder / "subjects", 5, seed=1)[3:]
    klora("profile", *new, "--store", studio.store)
    out = json.loads(studio.build("--add", "--json"))
    assert (out["linked"], out["kept"]) == (8, 12)
    pairs = told("catalogue", "list", studio.file, "--pairs")["pairs"]
    assert len(pairs) == 20
    assert [each for each in pairs if each in old] == old
    added = studio.file.read_bytes()
    studio.build("--force")
    assert studio.file.read_bytes() == added
    assert "other settings" in studio.build("--add", "--bias", "0.5", code=2)


def test_any_engine_links_equal_bytes(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    studio.build()
    here = studio.file.read_bytes()
    used: list[int] = []

    def engine(name: str, workers: int, **_: Any) -> Any:
        used.append(workers)
        return lambda: ThreadPoolExecutor(workers)

    monkeypatch.setattr("klora_compile.engines.engine_of", engine)
    monkeypatch.setattr("klora_compile.cataloguing.bulk._PIECE", 1)
    for workers in (1, 3):
        studio.build("--force", "--workers", workers)
        assert studio.file.read_bytes() == here
    assert used == [1, 3]


def test_pairs_that_do_not_fit_are_listed_with_reasons(studio: Studio) -> None:
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    other = write_lora(
        studio.folder / "styles" / "other.safetensors", peft_keys({name: random_pair(6, 4, 1)})
    )
    wide = write_lora(
        studio.folder / "styles" / "wide.safetensors", peft_keys({TO_Q: random_pair(6, 9, 1)})
    )
    klora("profile", other, wide, "--store", studio.store)
    out = json.loads(studio.build("--json"))
    assert out["linked"] == 12
    reasons = {why.partition(".")[0]: count for why, count in out["refused"].items()}
    assert sum(out["refused"].values()) == 6
    assert reasons["1 layers have two shapes"] == 3
    assert "the LoRAs have no denoiser layer in common" in reasons
    got = klora(
        *("catalogue", "get", studio.file, studio.subjects[0].stem, "wide"),
        *("-o", studio.folder / "a.klora.safetensors"),
        code=1,
    )
    assert "1 layers have two shapes" in got


def test_a_dry_run_writes_nothing(studio: Studio) -> None:
    out = json.loads(studio.build("--dry-run", "--json"))
    assert (out["linked"], out["contents"], out["styles"]) == (12, 3, 4)
    assert out["bytes_out"] > 0
    assert not studio.file.exists()


def test_loras_that_lack_sums_are_listed_or_completed(studio: Studio, tmp_path: Path) -> None:
    """As in a store to which somebody copied the profile of a LoRA of another rank."""
    own = write_lora(tmp_path / "seven.safetensors", peft_keys({TO_Q: random_pair(9, 8, 7)}))
    subject = write_lora(tmp_path / "two.safetensors", peft_keys({TO_Q: random_pair(9, 8, 2)}))
    one, other = tmp_path / "one", tmp_path / "other"
    klora("profile", own, "--store", one)
    klora("profile", subject, "--store", other)
    for path in one.rglob("*.safetensors"):
        (other / path.relative_to(one)).write_bytes(path.read_bytes())
    build = ("catalogue", other, "--content", "two", "--style", "seven", "-o", studio.file)
    said = klora(*build, code=1)
    assert "1 LoRAs lack sums" in said
    assert "two.safetensors" in said
    assert "1 pairs" in klora(*build, "--complete")


def test_rules_that_need_pairs_are_refused_by_name(studio: Studio) -> None:
    said = studio.build("--rule", "np", code=2)
    assert "rule np needs the LoRAs of a pair together" in said
    assert "klora, est, direct" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--content", "nobody*"), "--content nobody*: the store has no such LoRA"),
        (("--table", "a.csv"), "--table: expected NAME.jsonl or NAME.parquet"),
        (("--add",), "there is no catalogue"),
        (("--always", "content=x"), "content is no name for a LoRA that always acts"),
    ],
)
def test_what_is_asked_wrongly_is_said(
    arguments: Sequence[str], message: str, studio: Studio
) -> None:
    assert message in " ".join(studio.build(*arguments, code=2).split())


def test_filters_take_only_what_states_it(studio: Studio) -> None:
    tensors = peft_keys({TO_Q: random_pair(6, 4, 1)})
    path = studio.folder / "styles" / "free.safetensors"
    write_lora(path, tensors)
    from safetensors.torch import save_file

    save_file(tensors, str(path), metadata={"modelspec.license": "CC0-1.0"})
    klora("profile", path, "--store", studio.store)
    everything = json.loads(studio.build("--dry-run", "--json", "--licence", "*"))
    assert everything["styles"] == 5
    said = json.loads(studio.build("--dry-run", "--json", "--licence", "cc0*"))
    assert (said["contents"], said["styles"]) == (0, 1)
    assert json.loads(studio.build("--dry-run", "--json", "--family", "flux.1"))["styles"] == 0


def test_the_table_of_steps_says_that_it_is_rounded(studio: Studio) -> None:
    studio.build()
    out = studio.folder / "steps.safetensors"
    assert "not exact" in klora("catalogue", "steps", studio.file, "-o", out)
    header, data = read_raw(out)
    facts = json.loads(header["__metadata__"]["klora_steps"])
    shape = header["steps"]["shape"]
    assert shape == [len(facts["pairs"]), len(facts["layers"])] == [12, shape[1]]
    steps = torch.frombuffer(bytearray(data), dtype=torch.uint16).view(shape)
    from klora_runtime import Catalogue

    catalogue = Catalogue.open(studio.file)
    for row, names in enumerate(facts["pairs"]):
        for entry in catalogue.fusion(*names).entries:
            step = int(steps[row, facts["layers"].index(entry.path)])
            if entry.fate == "switching":
                assert abs(step / facts["parts"] - entry.timeline.starts[1]) <= 1 / facts["parts"]
            elif entry.fate.startswith("always"):
                assert step == (0 if entry.fate == "always style" else facts["parts"] + 1)
            else:
                assert step == 65535


def test_what_a_store_holds_is_printed_and_deleted(studio: Studio) -> None:
    bad = studio.folder / "bad.safetensors"
    bad.write_bytes(b"<html>")
    assert "refused" in klora("profile", bad, "--store", studio.store, code=1)
    facts = told("cache", "--info", "--store", studio.store)
    assert facts["files"] == {"statistics": 7, "profiles": 7, "quarantine": 1}
    assert facts["quarantine"][0]["path"] == str(bad)
    (studio.store / "notes.txt").write_text("mine")
    assert told("cache", "--clear", "--store", studio.store)["cleared"]
    assert Store(studio.store).contents().nbytes == 0
    assert (studio.store / "notes.txt").exists()
    assert "say what to do" in klora("cache", code=2)
