"""Searches on a tiny pipeline: cells, judges, failures, resuming, sheets, and the command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from support.shipped import PROMPT, Shipped, error_of, klora, pixels

from klora_compile import OwnPictures, Settings, compile_fusion
from klora_compile.rules import Direct, NpLora
from klora_compile.searching import About, Search, search
from klora_compile.searching.plan import Plan
from klora_compile.searching.run import _Run
from klora_compile.searching.space import baseline, candidates_of
from klora_compile.sweeping.grid import Cell
from klora_compile.sweeping.result import SweptCell
from klora_runtime import apply_fusion
from klora_runtime.errors import KloraError

COMMON = {"steps": 2}
AXES = {"rule": ["direct", "np"], "weight.style": [0.5, 1.0, 2.0]}
WRONG = {"label": "wrong", "rule": "groups", "table": {"content.3 *": "0:1"}}


def brightness(picture: Image.Image, about: About) -> float:
    return float(np.asarray(picture).mean())


@pytest.fixture
def pipe(shipped: Shipped) -> Any:
    return DiffusionPipeline.from_pretrained(shipped.model)


@pytest.fixture(scope="module")
def pair(shipped: Shipped) -> tuple[Path, Path]:
    return shipped.pair


def searched(
    pipe: Any, pair: tuple[Path, Path], axes: Mapping[str, Sequence[Any]] = AXES, **options: Any
) -> Search:
    asked: dict[str, Any] = {
        "prompt": PROMPT,
        "judge": brightness,
        "seeds": range(4),
        "best": 2,
        "settings": COMMON,
        "device": "cpu",
    }
    return search(pipe, *pair, axes, **(asked | options))


def alone(
    pipe: Any, pair: tuple[Path, Path], settings: Mapping[str, Any], seed: int
) -> Image.Image:
    """The picture of settings without a sweep."""
    rule = {"direct": Direct(), "np": NpLora()}[settings["rule"]]
    weights = Settings(weights={"style": settings.get("weight.style", 1.0)})
    with apply_fusion(pipe, compile_fusion(*pair, rule, weights, device="cpu")):
        generator = torch.Generator().manual_seed(seed)
        made: Image.Image = pipe(PROMPT, num_inference_steps=2, generator=generator).images[0]
    return made


def test_scores_are_the_judge_s_of_the_pictures_that_a_sweep_makes(
    pipe: Any, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    found = searched(pipe, pair, folder=tmp_path / "cells")
    assert found.judge == "brightness"
    assert found.cases == tuple((PROMPT, seed) for seed in range(4))
    for each in (found.plain_sum, *found.ranked[:2]):
        pictures = [alone(pipe, pair, each.settings, seed) for seed in range(4)]
        bright = [float(np.asarray(picture).mean()) for picture in pictures]
        assert each.scores == pytest.approx(bright)
        assert each.score == pytest.approx(fmean(bright))
    assert found.best.score == max(each.score or 0 for each in found.ranked[:2])
    assert [len(each.scores) for each in found.ranked] == [4, 4, 2, 2, 2]
    index = json.loads((tmp_path / "cells" / "index.json").read_text())
    assert index["candidates"][0]["settings"] == found.best.settings
    assert index["plain_sum"]["score"] == found.plain_sum.score


def test_a_check_uses_seeds_by_which_nothing_was_chosen(pipe: Any, pair: tuple[Path, Path]) -> None:
    asked: dict[str, set[int]] = {}

    def judge(picture: Image.Image, about: About) -> float:
        asked.setdefault(str(about.settings), set()).add(about.seed)
        return brightness(picture, about)

    found = searched(pipe, pair, judge=judge, seeds=[3, 5])
    assert found.check is not None
    assert found.check.seeds == (6, 7)
    fresh = {settings for settings, seeds in asked.items() if seeds & {6, 7}}
    assert fresh == {str(found.best.settings), str(found.plain_sum.settings)}
    assert len(found.check.best.scores) == len(found.check.plain_sum.scores) == 2
    assert "on seeds 6 to 7, by which nothing was chosen: " in found.text()
    assert searched(pipe, pair, check=False).check is None


def test_what_no_candidate_beats_is_the_plain_sum(pipe: Any, pair: tuple[Path, Path]) -> None:
    def judge(picture: Image.Image, about: About) -> float:
        plain = about.settings["rule"] == "direct" and "weight.style" not in about.settings
        return float(plain)

    found = searched(pipe, pair, judge=judge)
    assert not found.beats_plain_sum
    assert found.winner is found.plain_sum
    assert "no candidate beats the plain sum; take the plain sum" in found.text()
    better = searched(pipe, pair, judge=lambda picture, about: 1 - judge(picture, about))
    assert better.beats_plain_sum
    assert better.winner is better.best


def test_a_winner_by_lucky_seeds_is_not_taken(pipe: Any, pair: tuple[Path, Path]) -> None:
    def judge(picture: Image.Image, about: About) -> float:
        return float((about.settings["rule"] == "np") == (about.seed < 4))

    found = searched(pipe, pair, judge=judge)
    assert found.best.settings["rule"] == "np"
    assert found.best.score == 1.0
    assert not found.beats_plain_sum


def test_own_pictures_are_each_lora_alone(pipe: Any, pair: tuple[Path, Path]) -> None:
    told: list[Mapping[str, Sequence[Image.Image]]] = []

    def judge(picture: Image.Image, about: About) -> float:
        told.append(about.own)
        return 0.0

    own = OwnPictures({"content": "a fox", "style": ["a hut", "a cup"]}, count=2, steps=3)
    axes = {"weight.style": [0.5, 2.0]}
    searched(pipe, pair, axes, judge=judge, own=own, settings={**COMMON, "weight.content": 0.7})
    asked = [("content", pair[0], "a fox", 0), ("content", pair[0], "a fox", 1)]
    asked += [("style", pair[1], "a hut", 0), ("style", pair[1], "a cup", 1)]
    for slot, file, text, seed in asked:
        with apply_fusion(pipe, compile_fusion(file, device="cpu")):
            generator = torch.Generator().manual_seed(seed)
            picture = pipe(text, num_inference_steps=3, generator=generator).images[0]
        assert pixels(told[0][slot][seed]) == pixels(picture)
    assert {slot: len(own) for slot, own in told[0].items()} == {"content": 2, "style": 2}
    assert all(each is told[0] for each in told)


def test_a_candidate_that_fails_is_a_named_blank(pipe: Any, pair: tuple[Path, Path]) -> None:
    axes = {"cells": [WRONG, {"rule": "np"}]}
    found = searched(pipe, pair, axes)
    assert [each.label for each in found.ranked] == ["rule np", "wrong"]
    assert found.ranked[1].scores == ()
    assert str(found.ranked[1].error).startswith("table: there is no LoRA 'content.3'")
    assert "failed: wrong: table: there is no LoRA" in found.text()
    failed = [cell for cell in found.best_few.cells if cell.column == 2]
    assert [cell.picture for cell in failed] == [None] * 4
    assert all(cell.picture for cell in found.best_few.cells if cell.column < 2)
    assert found.sheet().width > 0
    with pytest.raises(KloraError, match="every candidate failed; wrong: table: there is no LoRA"):
        searched(pipe, pair, {"cells": [WRONG]})
    with pytest.raises(KloraError, match="the direct sum, which a search compares with, failed"):
        searched(pipe, pair, settings={**COMMON, "weight.content.low": 0.5})


class LateFailures:
    """Makes pictures, but none of a bias of 0.1 or 0.2 from seed 4 on."""

    def each(self, cells: Sequence[Cell], _: Any) -> Iterator[tuple[Cell, SweptCell]]:
        for cell in cells:
            late = cell.settings.get("bias") in (0.1, 0.2) and cell.settings["seed"] >= 4
            made = {"picture": None, "error": "late"} if late else {"picture": self.picture()}
            place = (cell.name, cell.sheet, cell.row, cell.column, cell.settings)
            yield cell, SweptCell(*place, idle=(), repeats=False, **made)

    @staticmethod
    def picture() -> Any:
        return Image.new("RGB", (8, 8))


def late(best: int, judge: Any) -> Search:
    base = {"prompt": PROMPT, "seed": 0, "rule": "klora"}
    some = candidates_of({"bias": [0.1, 0.2, 0.3, 0.4]}, base, 9, 0)
    asked = (["a fox"], list(range(8)), judge, "judge", {}, OwnPictures(), best, False)
    maker: Any = LateFailures()
    return _Run(maker, Plan(some, baseline(base), {}, *asked), None).result("title")


@pytest.mark.parametrize("best", [1, 2, 3])
def test_who_fails_late_is_replaced_until_the_best_are_complete(best: int) -> None:
    found = late(best, lambda picture, about: 1.0 - about.settings.get("bias", 1.0))
    assert (found.best.label, len(found.best.scores)) == ("bias 0.3", 8)
    places = [bool(each.scores) for each in found.ranked]
    assert places == sorted(places, reverse=True)  # who failed is last


def test_a_judge_may_change_the_picture_that_it_gets() -> None:
    def judge(picture: Image.Image, about: About) -> float:
        picture.thumbnail((2, 2))
        return 1.0

    cells = late(2, judge).best_few.cells
    assert {cell.picture.size for cell in cells if cell.picture} == {(8, 8)}


def test_a_search_goes_on_where_it_stopped_and_is_the_same(
    pipe: Any, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "cells"
    left: list[int] = []

    def interrupt(_: str, remaining: int) -> None:
        left.append(remaining)
        if len(left) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        searched(pipe, pair, folder=folder, on_picture=interrupt)
    assert left == list(range(26, 17, -1))  # 6 on 2 seeds, 3 on 2 more, 2 on 4 fresh ones: 26
    assert len(list(folder.glob("*.png"))) == 8
    made: list[str] = []
    again = searched(pipe, pair, folder=folder, on_picture=lambda name, _: made.append(name))
    assert len(made) == 18
    fresh = searched(pipe, pair)
    assert again.ranked == fresh.ranked
    assert again.check == fresh.check
    assert searched(pipe, pair, folder=folder, on_picture=interrupt).ranked == fresh.ranked
    with pytest.raises(KloraError, match="holds pictures of other inputs"):
        searched(pipe, (pair[1], pair[0]), folder=folder)


def test_a_judge_that_fails_ends_the_search_at_its_first_picture(
    pipe: Any, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    made: list[str] = []
    with pytest.raises(KloraError, match="judge <lambda> failed at direct sum, seed 0: expected"):
        searched(
            *(pipe, pair),
            judge=lambda picture, about: float("nan"),
            on_picture=lambda name, left: made.append(name),
        )
    assert made == ["direct sum, seed 0"]
    pipe(PROMPT, num_inference_steps=1)  # it is bare again


def by_command(shipped: Shipped, pair: tuple[Path, Path], *options: object) -> Any:
    fixed = ("--model", shipped.model, "--prompt", PROMPT, "--device", "cpu", "--steps", 2)
    return klora("sweep", *pair, *fixed, *options)


JUDGE = (
    "import numpy as np\n\n\ndef dark(picture, about):\n    return -np.asarray(picture).mean()\n"
)
OPTIONS = ("--rule", "direct,np", "--weight", "style=0.5,2", "--seed", "0,1", "--search", 3)


def test_the_command_writes_a_sheet_and_the_command_that_compiles_the_best(
    shipped: Shipped, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(JUDGE)
    words = (*OPTIONS, "--judge", "mine.py:dark", "-o", "best.png")
    result = by_command(shipped, pair, *words, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["kind"], facts["judge"], facts["outputs"]) == (
        *("search", "mine.py:dark"),
        ["best.png"],
    )
    assert len(facts["candidates"]) == 3
    assert facts["columns"][0] == f"direct sum = {facts['plain_sum']['score']:.3g}"
    assert facts["columns"][1].startswith(f"1: {facts['candidates'][0]['label']} = ")
    assert facts["rows"] == ["seed 0", "seed 1"]
    made = klora(*shlex.split(facts["command"])[1:], "--device", "cpu")
    assert made.exit_code == 0, made.output
    taken = facts["candidates"][0] if facts["beats_plain_sum"] else facts["plain_sum"]
    place = [cell for cell in facts["cells"] if cell["settings"]["seed"] == 1]
    cell = next(c for c in place if c["settings"].items() >= taken["settings"].items())
    picture = Path("best.cells", cell["file"])
    again = ("sample", "best.klora.safetensors", "--again", picture, "--model", shipped.model)
    repeated = klora(*again, "--device", "cpu", "-o", "again.png")
    assert repeated.exit_code == 0, repeated.output
    assert pixels(Path("again.png")) == pixels(picture)
    text = by_command(shipped, pair, *words, "--force").stdout
    assert text.startswith("wrote best.png\n")
    assert text.splitlines()[-1] == facts["command"]


@pytest.mark.parametrize(
    ("options", "status", "error"),
    [
        (("--judge", "mine.py:raises"), 1, "it raised ValueError: too dark"),
        (("--judge", "mine.py:nothing"), 2, "mine.py has no function nothing"),
        (("--judge", "word"), 2, "judge: expected own-pictures, MODULE:FUNCTION"),
        ((), 2, "the judge needs a prompt that shows the content LoRA alone"),
        (("--seed", "0,9223372036854775807"), 2, "name seeds up to 9223372036854775805"),
        (("--own-prompt", "beside=a"), 2, "prompts: there is no LoRA beside"),
        (("--judge", "mine.py:raises", "--guidance", "1,2"), 2, "sampled alike; name one value"),
    ],
)
def test_what_is_wrong_is_one_clear_error(
    shipped: Shipped,
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    status: int,
    error: str,
) -> None:
    pytest.importorskip("stlpips_pytorch", reason="stlpips-pytorch is not installed")
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def raises(picture, about):\n    raise ValueError('too dark')\n")
    result = by_command(shipped, pair, *OPTIONS, "-o", "best.png", *options)
    assert error in error_of(result, status)
    assert not Path("best.png").exists()


def test_one_lora_alone_is_searched_by_a_judge_of_ones_own(
    pipe: Any, pair: tuple[Path, Path]
) -> None:
    asked: dict[str, Any] = {"prompt": PROMPT, "settings": COMMON, "seeds": range(2)}
    found = search(pipe, pair[0], judge=brightness, candidates=2, device="cpu", **asked)
    assert len(found.ranked) == 2
    with pytest.raises(KloraError, match="own-pictures compares LoRAs with each other, and there"):
        search(pipe, pair[0], candidates=2, device="cpu", **asked)


def test_options_of_a_search_without_one_are_refused(
    shipped: Shipped, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    asked = ("--bias", "0,0.1", "-o", tmp_path / "grid.png")
    for option, value in (("--judge", "own-pictures"), ("--own-prompt", "style=a"), ("--best", 3)):
        found = error_of(by_command(shipped, pair, *asked, option, value), 2)
        assert f"{option} is for a search; add --search N." in found
