"""The shipped weights of drawings, and their sheet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drawings.loras.files import lora_path
from drawings.pipeline import DrawingPipeline, load
from drawings.sheet import Table, draw_sheet
from drawings.subjects import (
    HELD_OUT_STYLES,
    HELD_OUT_SUBJECTS,
    REPORTED_SUBJECTS,
    TRAINING_STYLES,
    TRAINING_SUBJECTS,
    TUNING_SUBJECTS,
    prompt,
)
from PIL import Image, ImageFont

from klora_compile import compile_fusion
from klora_compile.reading.adapter import read_adapter
from klora_runtime import apply_fusion

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "examples" / "drawings" / "weights"
LORAS = [
    *(lora_path(WEIGHTS, "subject", name) for name in HELD_OUT_SUBJECTS),
    *(lora_path(WEIGHTS, "style", name) for name in HELD_OUT_STYLES),
]


@pytest.fixture(scope="module")
def pipe() -> DrawingPipeline:
    return load(WEIGHTS)


def drawn(pipe: DrawingPipeline) -> Any:
    generator = torch.Generator().manual_seed(0)
    return pipe("a fox, noto style", 2, generator=generator, output_type="pt").images


# The weights.


def test_all_weights_are_there_and_small() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert set(LORAS) <= set(files)
    assert sum(path.stat().st_size for path in files) <= 40e6


def test_no_file_says_where_it_was_made() -> None:
    for path in (WEIGHTS / "base").rglob("*.json"):
        assert "_name_or_path" not in path.read_text(), path


@pytest.mark.parametrize("path", LORAS, ids=lambda path: path.stem)
def test_every_lora_is_read_and_fits_the_base(path: Path, pipe: DrawingPipeline) -> None:
    layers = read_adapter(path).layers
    assert len(layers) > 50
    for layer in layers.values():
        assert layer.shape == tuple(pipe.unet.get_submodule(layer.module).weight.shape)
        assert layer.up.any()


def test_what_is_held_out_is_held_out() -> None:
    assert not set(HELD_OUT_SUBJECTS) & set(TRAINING_SUBJECTS)
    assert not set(HELD_OUT_STYLES.values()) & set(TRAINING_STYLES.values())
    assert set(TUNING_SUBJECTS) | set(REPORTED_SUBJECTS) == set(HELD_OUT_SUBJECTS)
    assert not set(TUNING_SUBJECTS) & set(REPORTED_SUBJECTS)


def test_every_word_of_a_prompt_has_a_token(pipe: DrawingPipeline) -> None:
    unknown = pipe.tokenizer.unk_token_id
    for subject in (*TRAINING_SUBJECTS, *HELD_OUT_SUBJECTS):
        for style in (*TRAINING_STYLES, *HELD_OUT_STYLES):
            assert unknown not in pipe.tokenizer(prompt(subject, style)).input_ids


def test_fusing_two_loras_of_drawings(pipe: DrawingPipeline) -> None:
    bare = drawn(pipe)
    fusion = compile_fusion(LORAS[0], LORAS[-1], device="cpu")
    with apply_fusion(pipe, fusion) as handle:
        assert handle.report().switches > 0
        assert not torch.equal(drawn(pipe), bare)
    assert torch.equal(drawn(pipe), bare)


def test_labels_of_a_sheet_do_not_overlap() -> None:
    """Not even over single pictures, which are narrower."""
    cell = [Image.new("RGB", (48, 48), "white")]
    names = ("headphone", "firefox")
    fused = {names: cell}
    sheet = draw_sheet(Table({names[1]: cell}, {names[0]: cell}, fused), "a title")
    longest = ImageFont.load_default(15).getlength("headphone + firefox, fused")
    assert sheet.width > 2 * longest
