"""The studio: its pictures are those of ``klora sample`` with compiled artifacts, in any order."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from support.shipped import PROMPT, Shipped, klora, pixels
from tiny_pipeline import tiny_lora, tiny_pipeline

from klora_compile.measuring import measure as measuring
from klora_compile.trying.loras import loras_to_try
from klora_compile.trying.studio import StoppedError, Studio
from klora_compile.trying.trial import Trial, trial_of
from klora_runtime.errors import ConfigError, KloraError

BASE: Mapping[str, Any] = {"prompt": PROMPT, "steps": 2}

#: Settings that cover: thresholds, derived slots, merged slots, products, clocks, weights, calls.
SETTINGS: list[dict[str, Any]] = [
    {"rule": "direct"},
    {"rule": "klora", "bias": 0.3},
    {"rule": "klora", "bias": -0.6, "pattern": "s*", "weight.style": 0.6, "clock": "noise"},
    {"rule": "np", "mu": 2.0},
    {"rule": "np+klora", "weight.turbo": 0.5},
    {"rule": "ties", "density": 0.4, "weight.content": 0.7},
    {"rule": "auto-strength", "seed": 3},
    {"rule": "switch", "tau": 1, "steps": 3},
    {"rule": "level", "guidance": 3.5, "height": 40},
    {"rule": "dare", "rule.seed": 5, "negative_prompt": "a dog"},
    {"rule": "auto", "seed": 1},
]


@pytest.fixture(scope="module")
def files(shipped: Shipped) -> dict[str, Path]:
    folder = shipped.artifact.parent
    turbo = tiny_lora(tiny_pipeline("sd1"), folder / "turbo.safetensors", seed=7, strength=0.5)
    return {"content": folder / "fox.safetensors", "style": folder / "ink.safetensors"} | {
        "turbo": Path(turbo)
    }


@pytest.fixture(scope="module")
def studio(shipped: Shipped, files: dict[str, Path]) -> Iterator[Studio]:
    pipe = DiffusionPipeline.from_pretrained(shipped.model)
    pair = files["content"], files["style"]
    loras = loras_to_try(*pair, always={"turbo": files["turbo"]}, device="cpu")
    with Studio(pipe, loras) as studio:
        yield studio


def trial(settings: Mapping[str, Any]) -> Trial:
    return trial_of({**BASE, **settings})


#: Setting -> option of ``klora sample``; every other one is of ``klora compile``.
OF_SAMPLE = ("prompt", "steps", "seed", "guidance", "height", "negative_prompt")


def by_commands(
    settings: Mapping[str, Any], files: Mapping[str, Path], shipped: Shipped, folder: Path
) -> Any:
    """The pixels that ``klora compile`` and ``klora sample`` give."""
    words: dict[str, list[object]] = {"compile": [], "sample": []}
    given = {**BASE, **settings}
    for name, value in given.items():
        stem, dot, slot = name.partition(".")
        if stem == "rule" and dot:
            words["compile"] += [f"--{slot}", value]
        elif dot:
            words["compile"] += [f"--{stem}", f"{slot}={value}"]
        else:
            command = "sample" if name in OF_SAMPLE else "compile"
            words[command] += [f"--{name.replace('_', '-')}", value]
    if given.get("rule") == "switch":
        words["compile"] += ["--steps", given["steps"]]
    artifact, output = folder / "a.klora.safetensors", folder / "a.png"
    always = ("--always", f"turbo={files['turbo']}", "--device", "cpu", "--force")
    pair = files["content"], files["style"]
    made = klora("compile", *pair, *always, "-o", artifact, *words["compile"])
    assert made.exit_code == 0, made.output
    fixed = ("--model", shipped.model, "--device", "cpu", "--force", "-o", output)
    result = klora("sample", artifact, *fixed, *words["sample"])
    assert result.exit_code == 0, result.output
    return pixels(output)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: str(each["rule"]))
def test_pictures_are_those_of_the_commands(
    settings: dict[str, Any],
    studio: Studio,
    files: dict[str, Path],
    shipped: Shipped,
    tmp_path: Path,
) -> None:
    found = pixels(studio.picture(trial(settings)).shot.frames[0])
    assert found == by_commands(settings, files, shipped, tmp_path)


def test_pictures_do_not_depend_on_what_was_made_before(studio: Studio) -> None:
    """After random changes, errors and a stop in mid-run, each picture is what it was."""
    first = {
        number: pixels(studio.picture(trial(each)).shot.frames[0])
        for number, each in enumerate(SETTINGS)
    }
    assert len(set(first.values())) == len(SETTINGS)
    order = random.Random(0)
    for _ in range(15):
        number = order.randrange(len(SETTINGS))
        if order.random() < 0.4:
            with pytest.raises(KloraError):
                order.choice((fail, stop))(studio)
        assert pixels(studio.picture(trial(SETTINGS[number])).shot.frames[0]) == first[number]


def fail(studio: Studio) -> None:
    """Fail in the middle of a run, as for want of memory."""
    break_off(studio, ValueError("no memory"))


def stop(studio: Studio) -> None:
    break_off(studio, StoppedError("stopped"))


def break_off(studio: Studio, error: Exception) -> None:
    seen: list[int] = []

    def on_evaluation() -> None:
        seen.append(len(seen))
        if len(seen) == 4:
            raise error

    studio.picture(trial({"rule": "klora", "bias": 0.3, "steps": 3}), on_evaluation=on_evaluation)


def test_a_picture_stops_within_a_step(studio: Studio) -> None:
    seen: list[int] = []

    def on_evaluation() -> None:
        seen.append(len(seen))
        if len(seen) == 2:
            raise StoppedError("stopped")

    with pytest.raises(StoppedError):
        studio.picture(trial({"steps": 9}), on_evaluation=on_evaluation)
    assert len(seen) == 2


def test_nothing_is_measured_or_derived_twice(
    shipped: Shipped, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loras = loras_to_try(files["content"], files["style"], device="cpu")
    pipe = DiffusionPipeline.from_pretrained(shipped.model)
    measured: list[str] = []
    own = measuring.measure_layer

    def counting(*arguments: Any) -> Any:
        measured.append("layer")
        return own(*arguments)

    monkeypatch.setattr(measuring, "measure_layer", counting)
    layers = sum(len(adapter.layers) for adapter in loras.adapters.values())
    trials = [trial({"rule": "klora", "top_k": k, "bias": b}) for k in (4, 9) for b in (0.0, 0.2)]
    loras.measure(each.config for each in trials)
    assert len(measured) == layers
    with Studio(pipe, loras) as studio:
        for each in trials:
            assert studio.picture(each).deriving == 0.0
        assert len(measured) == layers
        np = [studio.picture(trial({"rule": "np", "mu": mu})) for mu in (0.5, 1.0, 0.5)]
    assert [each.deriving > 0 for each in np] == [True, True, False]


def test_the_pipeline_is_left_as_it_was(shipped: Shipped, files: dict[str, Path]) -> None:
    pipe = DiffusionPipeline.from_pretrained(shipped.model)
    pipe.set_progress_bar_config(desc="mine")
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    with Studio(pipe, loras_to_try(files["content"], files["style"], device="cpu")) as studio:
        studio.picture(trial({"rule": "klora"}))
        assert pipe._progress_bar_config == {"desc": "mine"}
    assert all(bool((before[n] == value).all()) for n, value in pipe.unet.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"bais": 1}, "bais: there is no such setting; expected rule, "),
        ({"rule": "np", "bias": 0.1}, "bias: rule np has no such setting"),
        ({"rule": "none"}, "rule: expected one of "),
        ({"bias": 7}, "bias: expected a number from -1 to 1, found 7."),
        ({"weight": 0.5}, "weight: name the LoRA behind a dot, such as weight.style."),
        ({"steps": 0}, "steps: expected a whole number from 1 to 10000, found 0."),
        ({"prompt": None}, "prompt: expected a text, found None; name one."),
    ],
)
def test_settings_that_are_wrong(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError) as raised:
        trial(settings)
    assert str(raised.value).startswith(error)
