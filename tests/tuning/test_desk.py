"""The desk: one generation at a time, stops within a step, pictures of ``klora sample``."""

from __future__ import annotations

import random
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.shipped import PROMPT, Shipped, klora, pixels
from tiny_pipeline import tiny_lora, tiny_pipeline

from klora_compile.settings.read_options import ReadOptions
from klora_compile.trying.studio import StoppedError
from klora_compile.tuning.controls import Controls
from klora_compile.tuning.desk import STRIP, Desk
from klora_compile.tuning.opening import Opening
from klora_compile.tuning.repeating import Recipe
from klora_runtime.errors import ConfigError, KloraError

FIRST = {"rule": "klora", "steps": "2", "seed": "0", "prompt": PROMPT}


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that always acts."""
    path = tmp_path_factory.mktemp("always") / "turbo.safetensors"
    return tiny_lora(tiny_pipeline("sd1"), path, seed=7, strength=0.5)


@pytest.fixture(scope="module")
def desk(shipped: Shipped, turbo: Path) -> Iterator[Desk]:
    folder, beside = shipped.artifact.parent, {"turbo": turbo}
    files = [folder / "fox.safetensors"], [folder / "ink.safetensors"]
    desk = Opening(*files, beside, ReadOptions(), str(shipped.model), device="cpu").desk()
    yield desk
    desk.close()


def drawn(desk: Desk, tab: str = "tab", **changes: str) -> object:
    made = desk.run(tab).picture({**FIRST, **changes}, lambda done: None)
    return pixels(made.shot.frames[0])


def by_commands(recipe: Recipe, settings: dict[str, str]) -> object:
    """The picture of the commands that the page states, run in the working folder."""
    for line in recipe.commands(settings, "x.klora.safetensors", None).splitlines():
        result = klora(*shlex.split(line)[1:], "--force")
        assert result.exit_code == 0, result.output
    return pixels(Path("x.png"))


def fail(done: int) -> None:
    raise ValueError("no memory")


def random_values(chance: random.Random) -> list[str | float | int | None]:
    """Values of the controls, as a browser sends them."""
    rule, box = chance.choice(
        [("klora", ""), ("klora", "top_k=5"), ("np", "mu=1"), ("ties", ""), ("level", "guidance=3")]
    )
    pattern, clock = chance.choice(["s", "s*"]), chance.choice(["step", "noise"])
    weights = [round(chance.uniform(0, 2), 2) for _ in ("content", "style", "turbo")]
    steps, seed = chance.choice([1, 2]), chance.randrange(99)
    return [rule, chance.uniform(-1, 1), pattern, clock, *weights, steps, seed, PROMPT, box]


def test_after_random_changes_and_errors_the_picture_is_that_of_the_commands(
    desk: Desk, shipped: Shipped, turbo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, chance = shipped.artifact.parent, random.Random(0)
    loras = [str(folder / f"{name}.safetensors") for name in ("fox", "ink")]
    recipe = Recipe(
        (*loras, "--always", f"turbo={turbo}", "--device", "cpu"),
        ("--model", str(shipped.model), "--device", "cpu"),
    )
    controls, settings = Controls(desk.slots), FIRST
    for turn in range(30):
        settings = controls.settings(random_values(chance))
        last = drawn(desk, **settings)
        if turn % 10 == 4:
            with pytest.raises(KloraError, match="no memory"):
                desk.run("tab").picture({**settings, "seed": "123"}, fail)
    assert last == by_commands(recipe, settings)
    with pytest.raises(ConfigError):
        drawn(desk, steps="0")
    changed = {**settings, "seed": "7"}
    assert drawn(desk, **changed) == by_commands(recipe, changed)


def test_a_run_stops_before_the_next_evaluation(desk: Desk) -> None:
    seen: list[int] = []

    def on_evaluation(done: int) -> None:
        seen.append(done)
        if done == 2:
            desk.stop("tab")

    with pytest.raises(StoppedError):
        desk.run("tab").picture({**FIRST, "steps": "9", "seed": "1"}, on_evaluation)
    assert seen == [0, 1, 2]
    assert drawn(desk, seed="1") == drawn(desk, seed="1")


def test_a_newer_run_of_a_tab_stops_the_older_one_and_no_other_tab_s(desk: Desk) -> None:
    older, other = desk.run("tab"), desk.run("other")
    desk.run("tab")
    with pytest.raises(StoppedError):
        older.picture({**FIRST, "seed": "2"}, lambda done: None)
    other.picture({**FIRST, "seed": "2"}, lambda done: None)


def test_one_generation_at_a_time_and_a_waiting_one_can_be_stopped(desk: Desk) -> None:
    entered, go_on = threading.Event(), threading.Event()
    ends: list[str] = []

    def hold(done: int) -> None:
        entered.set()
        assert go_on.wait(60)

    def long() -> None:
        desk.run("one").picture({**FIRST, "seed": "3"}, hold)
        ends.append("one")

    def waiting() -> None:
        with pytest.raises(StoppedError):
            desk.run("two").picture({**FIRST, "seed": "4"}, lambda done: ends.append("evaluated"))
        ends.append("two")

    first, second = threading.Thread(target=long), threading.Thread(target=waiting)
    first.start()
    assert entered.wait(60)
    second.start()
    assert desk.fusion({**FIRST, "bias": "0.7"}).rule.parameters["bias"] == 0.7
    second.join(0.2)
    assert second.is_alive()
    desk.stop("two")
    second.join(60)
    assert ends == ["two"]
    go_on.set()
    first.join(60)
    assert ends == ["two", "one"]


def test_the_plain_sum_beside_it_has_the_same_weights_and_seed(desk: Desk) -> None:
    settings = {**FIRST, "bias": "0.4", "weight.style": "0.5", "seed": "5"}
    beside = desk.run("tab").plain_sum(settings, lambda done: None)
    alone = {k: v for k, v in settings.items() if k != "bias"} | {"rule": "direct"}
    assert pixels(beside.shot.frames[0]) == drawn(desk, **{**alone, "prompt": PROMPT})


def test_the_strip_keeps_each_setting_once_the_newest_first(desk: Desk) -> None:
    for seed in ("6", "7", "6"):
        drawn(desk, seed=seed, bias="0.15")
    newest = [each.settings["seed"] for each in desk.tried if each.settings.get("bias") == "0.15"]
    assert newest == ["7", "6"]
    first = desk.tried[0]
    assert desk.numbered(first.number) is first
    assert max(first.thumbnail.size) <= 128
    picture = desk.run("tab").picture(dict(first.settings), lambda done: None)
    for number in range(STRIP):
        desk.keep({**FIRST, "seed": str(1000 + number)}, picture)
    assert len(desk.tried) == STRIP
    assert desk.numbered(first.number) is None


def test_the_first_settings_are_those_of_the_commands(desk: Desk) -> None:
    assert desk.first_settings({}) == {"rule": "klora", "steps": "50", "seed": "0", "prompt": ""}
    assert desk.first_settings({"rule": "np", "steps": "4"})["rule"] == "np"
    with pytest.raises(ConfigError, match="bais: there is no such setting"):
        desk.first_settings({"bais": "1"})


def test_a_pipeline_of_videos_is_refused(desk: Desk) -> None:
    class Video:
        def __call__(self, prompt: str, num_frames: int = 1) -> None: ...

    class Studio:
        pipe = Video()

    with pytest.raises(ConfigError, match="Video makes videos, and the page shows pictures"):
        Desk(Studio())  # type: ignore[arg-type]
