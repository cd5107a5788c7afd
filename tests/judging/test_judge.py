"""Judges by name, what they answer, and the judge that compares with each LoRA's own pictures."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from klora_compile.judging.judge import OWN_PICTURES, About, judge_named, name_of, verdict
from klora_compile.judging.networks import available
from klora_compile.judging.own_pictures import OwnPicturesJudge, as_tensor
from klora_runtime.errors import ConfigError, KloraError

ABOUT = About("a fox", 7, {"rule": "klora"})


def plain(colour: str, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, colour)


def judged(judge: Any) -> float:
    return verdict(judge, "mine.py:good", plain("red"), ABOUT, "rule klora")


def test_a_judge_is_found_in_a_file_and_in_a_module(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n\n\n@dataclass\nclass Kept:\n    x: float\n\n\n"
        "def good(picture, about):\n    return Kept(picture.getpixel((0, 0))[0] + about.seed).x\n"
    )
    assert judged(judge_named(f"{tmp_path / 'mine.py'}:good")) == 262
    assert judge_named("operator:add")(1, 2) == 3  # type: ignore[arg-type]
    assert name_of("operator:add") == "operator:add"
    assert name_of(judged) == "judged"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("own", "expected own-pictures, MODULE:FUNCTION or FILE.py:FUNCTION, found 'own'"),
        (":f", "expected own-pictures"),
        ("operator:nothing", "operator has no function nothing"),
        ("math:pi", "math has no function pi"),
        ("nowhere_at_all:f", "module nowhere_at_all cannot be imported: ModuleNotFoundError"),
        ("missing.py:f", "module missing.py cannot be imported: FileNotFoundError"),
    ],
)
def test_a_judge_that_is_not_there_is_one_clear_error(name: str, error: str) -> None:
    with pytest.raises(KloraError, match=error):
        judge_named(name)


def test_a_module_that_fails_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(KloraError, match=r"broken\.py cannot be imported: ZeroDivisionError"):
        judge_named(f"{tmp_path / 'broken.py'}:f")


def test_a_judge_that_exits_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("raise SystemExit(0)\n")
    with pytest.raises(KloraError, match=r"script\.py cannot be imported: SystemExit: 0"):
        judge_named(f"{tmp_path / 'script.py'}:f")
    with pytest.raises(KloraError, match="seed 7: it raised SystemExit"):
        judged(lambda picture, about: sys.exit(0))


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (float("nan"), "nan"),
        pytest.param(10**400, "1000", id="too large"),
        (float("inf"), "inf"),
        (None, "None"),
        ("0.5", "'0.5'"),
        (True, "True"),
        (torch.tensor(0.5), "tensor"),
    ],
)
def test_an_answer_that_is_no_number_is_one_clear_error(answer: Any, found: str) -> None:
    with pytest.raises(KloraError) as raised:
        judged(lambda picture, about: answer)
    text = str(raised.value)
    assert text.startswith("the judge mine.py:good failed at rule klora, seed 7: expected a finite")
    assert f"found {found}" in text


@pytest.mark.parametrize("answer", [1, 0.25, np.float32(0.5), np.int64(3)])
def test_numbers_of_any_library_are_answers(answer: Any) -> None:
    found = judged(lambda picture, about: answer)
    assert found == answer
    assert type(found) is float


def test_a_judge_that_raises_is_one_clear_error() -> None:
    with pytest.raises(KloraError, match=r"seed 7: it raised ZeroDivisionError: division by zero"):
        judged(lambda picture, about: 1 / 0)


# The judge that comes with klora.


def colour(pictures: torch.Tensor) -> torch.Tensor:
    """A subject is a colour here, and a style is how bright the lower half is."""
    return pictures.mean((2, 3))


def light(pictures: torch.Tensor) -> torch.Tensor:
    low, high = (half.mean((1, 2, 3)) for half in pictures.chunk(2, dim=2))
    return torch.stack([low, high], 1)


def two_halves(upper: str, lower: str) -> Image.Image:
    image = plain(upper)
    image.paste(plain(lower, (8, 4)), (0, 4))
    return image


OWN = {
    "content": (plain("red"), plain("red")),
    "style": (two_halves("blue", "white"), two_halves("blue", "white")),
}


def own_judge() -> OwnPicturesJudge:
    return OwnPicturesJudge({"content": colour, "style": light})


def test_own_pictures_are_the_ends_of_the_scale() -> None:
    judge, about = own_judge(), About("", 0, {}, OWN)
    assert judge.likenesses(OWN["content"][0], about) == pytest.approx({"content": 1, "style": 0})
    assert judge.likenesses(OWN["style"][0], about) == pytest.approx({"content": 0, "style": 1})
    assert judge(OWN["content"][0], about) == 0.0
    both = two_halves("red", "pink")
    assert min(judge.likenesses(both, about).values()) > 0.3
    assert judge(both, about) > 0.3


def test_other_own_pictures_are_another_scale() -> None:
    judge, both = own_judge(), two_halves("red", "pink")
    first = judge(both, About("", 0, {}, OWN))
    swapped = {"content": OWN["style"], "style": OWN["content"]}
    assert judge(both, About("", 0, {}, swapped)) != first
    assert judge(both, About("", 0, {}, OWN)) == first


@pytest.mark.parametrize(
    ("own", "error"),
    [
        ({}, "needs two LoRAs or more with a prompt each"),
        ({"content": OWN["content"]}, "needs two LoRAs or more"),
        ({"content": OWN["content"], "style": OWN["content"]}, "cannot tell the own pictures of"),
    ],
)
def test_without_own_pictures_that_differ_it_cannot_judge(own: Any, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        own_judge()(plain("red"), About("", 0, {}, own))


def test_large_pictures_are_made_smaller_first() -> None:
    assert as_tensor([plain("red", (1024, 300))]).shape == (1, 3, 224, 224)
    assert as_tensor([plain("red", (48, 48))]).shape == (1, 3, 48, 48)


def test_the_networks_see_subject_and_style() -> None:
    if (missing := available()) is not None:
        pytest.skip(missing)
    judge = judge_named(OWN_PICTURES)
    assert isinstance(judge, OwnPicturesJudge)
    about = About("", 0, {}, OWN)
    found = judge.likenesses(OWN["content"][0], about)
    assert found == pytest.approx({"content": 1, "style": 0}, abs=1e-3)
    assert judge(two_halves("red", "white"), about) > 0


def test_missing_networks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        return None if name == "stlpips_pytorch" else find_spec(name)

    if available() is not None:
        pytest.skip("the packages of the networks are not installed (extra evaluate)")
    monkeypatch.setattr("klora_compile.judging.networks.find_spec", absent)
    with pytest.raises(KloraError, match=r"own-pictures needs stlpips_pytorch.*\[evaluate\]"):
        judge_named(OWN_PICTURES)
