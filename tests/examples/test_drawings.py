"""What ships with the example of drawings: base, LoRAs, true drawings; and its sheet."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline
from drawings import shipped
from drawings.base.subjects import HELD_OUT_SUBJECTS
from drawings.loras import publish
from drawings.loras.acceptance import Entry, Ledger
from drawings.loras.recipes import Regime
from drawings.sheet import draw_sheet
from drawings.shipped import PAIRS, STYLES, SUBJECTS, style_lora, subject_lora, true_drawing
from PIL import Image, ImageFont

from klora_compile import compile_fusion
from klora_compile.reading.adapter import read_adapter
from klora_runtime import apply_fusion

DRAWINGS = Path(shipped.__file__).parent
LORAS = [*map(subject_lora, SUBJECTS), *map(style_lora, STYLES)]


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return shipped.base()


def test_all_of_the_example_is_small() -> None:
    files = [path for path in DRAWINGS.rglob("*") if "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files if path.is_file()) <= 45e6


def test_what_ships_is_there_and_nothing_else() -> None:
    assert set(shipped.LORAS.iterdir()) == set(LORAS)
    pictures = {true_drawing(*pair) for pair in PAIRS}
    assert set(shipped.TRUE_DRAWINGS.iterdir()) == pictures
    assert len(pictures) <= 20
    assert all(Image.open(path).size == (48, 48) for path in pictures)


def test_the_pairs_of_the_demo_are_of_loras_that_ship() -> None:
    assert set(SUBJECTS) <= set(HELD_OUT_SUBJECTS)
    assert {subject for subject, _ in PAIRS} <= set(SUBJECTS)
    assert {style for _, style in PAIRS} == set(STYLES) == set(shipped.OWN_SUBJECTS)


@pytest.mark.parametrize("path", LORAS, ids=lambda path: path.stem)
def test_a_lora_is_the_one_of_the_records(path: Path) -> None:
    record = json.loads(shipped.RECORDS.read_text())[shipped.REGIME][path.stem]
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert Entry(**record).accepted


@pytest.mark.parametrize("path", LORAS, ids=lambda path: path.stem)
def test_a_lora_is_read_and_fits_the_base(path: Path, pipe: StableDiffusionPipeline) -> None:
    layers = read_adapter(path).layers
    assert len(layers) > 50
    for layer in layers.values():
        assert layer.shape == tuple(pipe.unet.get_submodule(layer.module).weight.shape)
        assert layer.up.any()


def test_no_file_says_where_it_was_made() -> None:
    for path in shipped.BASE.rglob("*.json"):
        assert "_name_or_path" not in path.read_text(), path


def test_fusing_two_loras_of_drawings(pipe: StableDiffusionPipeline) -> None:
    def drawn() -> Any:
        noise = torch.Generator().manual_seed(0)
        text = "a penguin, ink style"
        return pipe(text, num_inference_steps=2, generator=noise, output_type="pt").images

    bare = drawn()
    with apply_fusion(pipe, compile_fusion(LORAS[0], LORAS[-1], device="cpu")) as handle:
        assert handle.report().switches > 0
        assert not torch.equal(drawn(), bare)
    assert torch.equal(drawn(), bare)


# Publishing.


def test_only_accepted_loras_are_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loras, here = tmp_path / "loras", tmp_path / "here"
    for folder in (loras / "entangled", loras / "disentangled", here):
        folder.mkdir(parents=True)
    (here / "weights").mkdir()
    (here / "weights" / "subject-earlier.safetensors").touch()
    for name, place in (("LORAS", "weights"), ("TRUE_DRAWINGS", "true"), ("RECORDS", "r.json")):
        monkeypatch.setattr(publish, name, here / place)
    monkeypatch.setattr(publish, "REGIME", Regime.ENTANGLED)
    monkeypatch.setattr(publish, "SUBJECTS", ("penguin",))
    monkeypatch.setattr(publish, "STYLES", ("ink",))
    monkeypatch.setattr(publish, "PAIRS", (("penguin", "ink"),))
    monkeypatch.setattr(publish, "drawing", lambda *_: torch.ones(3, 48, 48))
    monkeypatch.setattr(publish, "true_drawing", lambda *_: here / "true" / "x.png")

    def published(similarity: float) -> Any:
        for stem, found in (("subject-penguin", similarity), ("style-ink", None)):
            (loras / "entangled" / f"{stem}.safetensors").write_bytes(b"lora")
            Ledger(loras / "entangled").add(stem, Entry(1, 100, 0.5, found, "aa"))
        return CliRunner().invoke(publish.main, [str(tmp_path), str(loras)])

    refused = published(0.5)
    assert "has no accepted LoRA of subject-penguin. Train it first." in refused.output
    assert (here / "weights" / "subject-earlier.safetensors").is_file()
    assert published(0.7).exit_code == 0
    names = {path.name for path in here.rglob("*") if path.is_file()}
    assert names == {"subject-penguin.safetensors", "style-ink.safetensors", "x.png", "r.json"}
    records = json.loads((here / "r.json").read_text())
    assert records["entangled"]["subject-penguin"]["similarity"] == 0.7


# The sheet.


def test_names_on_a_sheet_do_not_overlap() -> None:
    cell = Image.new("RGB", (48, 48), "red")
    long = "the headphone and the firefox, both fused"
    columns = [long, "one\n" + long]
    sheet = draw_sheet("a title", columns, {f"{long}\n+ ink": [cell, None]})
    longest = ImageFont.load_default(15).getlength(long)
    assert sheet.width > 3 * longest
    red = [sheet.getpixel((x, sheet.height - 80)) == (255, 0, 0) for x in range(sheet.width)]
    assert sum(red) == 144
    assert red.index(True) > longest
