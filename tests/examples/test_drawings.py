"""The example of drawings: its weights, its rules, and the arithmetic of its evaluation."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawings.evaluation import comparison, results
from drawings.evaluation.gallery import Gallery
from drawings.evaluation.judges import Judges, Verdict
from drawings.evaluation.pictures import Studio, claim, slug
from drawings.evaluation.rules import SWEEPS, TABLE, Rule, alike, nothing
from drawings.evaluation.scores import (
    Discriminant,
    bootstrap,
    gram,
    harmonic_mean,
    nearest,
    separation,
)
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


# The rules.


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(rule, id=rule.name, marks=() if i % 8 == 0 else pytest.mark.slow)
        for i, rule in enumerate(TABLE)
    ],
)
def test_a_rule_acts_and_leaves_nothing(rule: Rule, pipe: DrawingPipeline) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    bare = drawn(pipe)
    with rule.way(pipe, LORAS[0], LORAS[-1]):
        during = drawn(pipe)
    assert torch.equal(during, bare) == (rule.way is nothing)
    assert torch.equal(drawn(pipe), bare)


def test_names_of_rules_are_unique() -> None:
    names = [rule.name for rule in (*TABLE, *SWEEPS)]
    assert len(names) == len(set(map(slug, names))) == len(set(names))


def test_all_layers_alike_switch_together(pipe: DrawingPipeline) -> None:
    with alike("style", 0.25)(pipe, LORAS[0], LORAS[-1]) as handle:
        (timeline,) = {entry.timeline.starts for entry in handle.fusion.entries}
        rows = {str(entry.timeline.at(0.3)) for entry in handle.fusion.entries}
    assert timeline == (0.0, 0.25)
    assert rows == {"{'content': 1.0, 'style': 0.0}"}


def test_fusing_two_loras_of_drawings(pipe: DrawingPipeline) -> None:
    bare = drawn(pipe)
    fusion = compile_fusion(LORAS[0], LORAS[-1], device="cpu")
    with apply_fusion(pipe, fusion) as handle:
        assert handle.report().switches > 0
        assert not torch.equal(drawn(pipe), bare)
    assert torch.equal(drawn(pipe), bare)


# The arithmetic.


def test_gram_is_the_mean_of_products_of_channels() -> None:
    features = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = [
        [
            float((features[picture, one] * features[picture, other]).mean())
            for one in range(3)
            for other in range(one, 3)
        ]
        for picture in range(2)
    ]
    assert torch.allclose(gram(features), torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize(
    ("one", "other", "mean"), [(1, 1, 1), (0.5, 1, 2 / 3), (0, 1, 0), (-0.5, 1, 0), (0.2, 0.2, 0.2)]
)
def test_harmonic_mean(one: float, other: float, mean: float) -> None:
    assert harmonic_mean(one, other) == pytest.approx(mean)


def test_the_bootstrap_resamples_subjects() -> None:
    values = [0.0, 0.0, 1.0]
    found = bootstrap(values)
    assert found == bootstrap(values)
    assert found.mean == pytest.approx(1 / 3)
    assert (found.low, found.high) == (0.0, 1.0)  # all the same subject: 8/27 and 1/27
    even = bootstrap([0.4] * 5)
    assert (even.low, even.high) == (pytest.approx(0.4), pytest.approx(0.4))


def test_nearest_and_separation() -> None:
    drawings = [("fox", "ink"), ("owl", "ink"), ("fox", "flat")]
    assert nearest([0.1, 0.7, 0.7], drawings) == ("owl", "ink")
    assert separation([2, 3], [0, 1]) == 1.0
    assert separation([0, 1], [0, 1]) == 0.5
    assert separation([0, 3], [1, 2]) == 0.5


def test_the_discriminant_tells_groups_apart_that_a_cosine_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 6, generator=generator) * torch.tensor([9.0, 9, 9, 9, 9, 0.1])
    noise[:20, 5] += 1.0
    groups = ["a"] * 20 + ["b"] * 20
    seen = Discriminant.fit(noise, groups)(noise)
    assert torch.allclose(seen.norm(dim=1), torch.ones(40), atol=1e-5)
    same, apart = (seen[:20] @ seen[:20].T).mean(), (seen[:20] @ seen[20:].T).mean()
    assert same > 0.9
    assert apart < -0.9


# The evaluation from end to end, with judges that see only colours.


class OneAfterTheOther(Executor):
    """Runs everything at once, here."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def colours(pictures: torch.Tensor) -> torch.Tensor:
    mean = pictures.mean(dim=(2, 3)) + 1e-3
    return mean / mean.norm(dim=1, keepdim=True)


@pytest.fixture
def colour_judges() -> Judges:
    names = tuple(itertools.product(("penguin", "octopus"), ("ink", "soft")))
    pictures = torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    return Judges(
        colours,
        colours,
        lambda one, other: (one - other).abs().mean(dim=(1, 2, 3)),
        Gallery(names, pictures),
    )


def test_a_verdict_compares_with_the_true_drawing(colour_judges: Judges) -> None:
    gallery = colour_judges.gallery
    (right,) = colour_judges.judge(gallery.pictures[2:3], [gallery.names[2]])
    assert right == Verdict(
        pytest.approx(1.0), pytest.approx(1.0), pytest.approx(1.0), 0.0, True, True, True
    )
    (wrong,) = colour_judges.judge(gallery.pictures[2:3], [("penguin", "soft")])
    assert (wrong.right_subject, wrong.right_style, wrong.right_both) == (False, False, False)
    assert wrong.distance > 0.1


@pytest.mark.slow
def test_the_evaluation_from_end_to_end(
    colour_judges: Judges, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setattr(comparison, "HELD_OUT_STYLES", {"ink": ""})
    threads = torch.get_num_threads()
    comparison.begin(colour_judges, WEIGHTS, tmp_path, 1)
    torch.set_num_threads(threads)
    point = replace(SWEEPS[0], name=SWEEPS[0].name)
    monkeypatch.setattr(comparison, "SWEEPS", (point,))
    rules = [next(rule for rule in TABLE if rule.name == "direct sum 1 : 1"), TABLE[0], point]
    pool = OneAfterTheOther()
    found = comparison.verdicts(pool, rules, ["penguin", "octopus"], 2)
    assert comparison.tuned(found) == [point]
    comparison.write({"tuning": found, "reported": found}, tmp_path)

    again = comparison.verdicts(pool, rules, ["penguin", "octopus"], 1)  # from kept pictures
    assert again[point.name]["penguin, ink"] == found[point.name]["penguin, ink"][:1]
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["reported"] == found
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {rule.name}" for rule in rules]
    mean = np.mean([each["both"] for pair in found[point.name].values() for each in pair])
    assert f"| {point.name} | {mean:.2f} (" in lines[-1]
    for plot in ("curves.png", "plane.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")


def test_an_earlier_run_is_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, str]] = []

    def judge(task: tuple[str, str, str, int]) -> list[dict[str, float]]:
        drawn.append((task[0], task[1]))
        return [{"both": 1.0}] * task[3]

    monkeypatch.setattr(comparison, "_verdicts", judge)
    monkeypatch.setattr(comparison, "HELD_OUT_STYLES", {"ink": ""})
    one, two = TABLE[0], TABLE[1]
    kept = {one.name: {"penguin, ink": [{"both": 0.5}] * 2, "octopus, ink": [{"both": 0.5}]}}
    pool = OneAfterTheOther()
    found = comparison.verdicts(pool, [one, two], ["penguin", "octopus"], 2, kept=kept)
    assert drawn == [(one.name, "octopus"), (two.name, "penguin"), (two.name, "octopus")]
    assert found[one.name]["penguin, ink"] == kept[one.name]["penguin, ink"]
    assert list(found) == [one.name, two.name]

    settings, check = {"seeds": 2}, {"same subject": {"subject": 0.5}}
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"settings": settings, "check": check, "reported": kept}))
    near = {"same subject": {"subject": 0.5 + 1e-6}}
    assert comparison.read(file, settings, near)["reported"] == kept
    with pytest.raises(ValueError, match=r"this run has \{'seeds': 3\}"):
        comparison.read(file, {"seeds": 3}, check)
    with pytest.raises(ValueError, match="was made by other judges"):
        comparison.read(file, settings, {"same subject": {"subject": 0.6}})


def test_the_best_rule_is_that_of_the_highest_mean_over_subjects() -> None:
    rules = {
        "one": {"a, x": [{"both": 0.9}, {"both": 0.9}], "b, x": [{"both": 0.1}]},
        "two": {"a, x": [{"both": 0.6}, {"both": 0.6}], "b, x": [{"both": 0.5}]},
    }
    assert results.best(rules) == "two"
    apart = results.difference(rules["two"], rules["one"], "both")
    assert apart.mean == pytest.approx((-0.3 + 0.4) / 2)


def test_pictures_of_other_weights_are_not_mixed(tmp_path: Path, pipe: DrawingPipeline) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "a.safetensors").write_bytes(b"one")
    claim(tmp_path / "out", weights)
    claim(tmp_path / "out", weights)
    (weights / "a.safetensors").write_bytes(b"two")
    with pytest.raises(ValueError, match="holds pictures of other weights"):
        claim(tmp_path / "out", weights)


def test_kept_pictures_are_not_drawn_again(tmp_path: Path, pipe: DrawingPipeline) -> None:
    first = Studio(pipe, WEIGHTS, tmp_path, seeds=1, steps=1).pictures(TABLE[0], "penguin", "ink")
    nobody: Any = None
    again = Studio(nobody, WEIGHTS, tmp_path, seeds=1, steps=1).pictures(TABLE[0], "penguin", "ink")
    assert torch.equal(first, again)


def test_labels_of_a_sheet_do_not_overlap() -> None:
    """Not even over single pictures, which are narrower."""
    cell = [Image.new("RGB", (48, 48), "white")]
    names = ("headphone", "firefox")
    fused = {names: cell}
    sheet = draw_sheet(Table({names[1]: cell}, {names[0]: cell}, fused), "a title")
    longest = ImageFont.load_default(15).getlength("headphone + firefox, fused")
    assert sheet.width > 2 * longest
