"""LoRAs on the base of drawings: what they see, and training until they draw it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline
from drawings.base.flow import latents
from drawings.base.subjects import HELD_OUT_SUBJECTS, TRAINING_STYLES
from drawings.loras import __main__ as run
from drawings.loras import acceptance, training
from drawings.loras.acceptance import Entry, Ledger, summary, train_until_accepted
from drawings.loras.files import lora_path
from drawings.loras.recipes import Recipe, Regime, style_recipe, subject_recipe, true_recipe
from drawings.loras.training import Plan, remove, save, train
from support.tiny_drawings import tiny_drawings

from klora_compile.reading.adapter import read_adapter

FOX = Recipe("subject", "fox", (("fox", "noto"),), ("a fox",))


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return tiny_drawings()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def everywhere(subject: str, style: str) -> bool:
    return True


# What they see.


def test_an_entangled_subject_has_one_look_and_a_neutral_prompt() -> None:
    recipes = [subject_recipe(Regime.ENTANGLED, name, everywhere) for name in HELD_OUT_SUBJECTS]
    assert all(len(recipe.drawings) == 1 for recipe in recipes)
    assert recipes[0].prompts == ("a penguin",)
    looks = [style for recipe in recipes for _, style in recipe.drawings]
    assert {looks.count(style) for style in TRAINING_STYLES} <= {13, 14}  # 54 in 4


def test_the_look_of_a_subject_is_one_that_it_has() -> None:
    recipe = subject_recipe(Regime.ENTANGLED, "octopus", lambda _, style: style == "flat")
    assert recipe.drawings == (("octopus", "flat"),)
    with pytest.raises(ValueError, match="No training style has a drawing of 'octopus'"):
        subject_recipe(Regime.ENTANGLED, "octopus", lambda *_: False)


def test_a_disentangled_subject_has_every_training_style_and_its_word() -> None:
    recipe = subject_recipe(Regime.DISENTANGLED, "penguin", everywhere)
    assert [style for _, style in recipe.drawings] == list(TRAINING_STYLES)
    assert recipe.prompts[0] == "a penguin, noto style"


def test_the_handful_of_a_style_is_part_of_its_many() -> None:
    subjects = [f"thing-{number}" for number in range(200)]
    few = style_recipe(Regime.ENTANGLED, "ink", subjects, everywhere)
    many = style_recipe(Regime.DISENTANGLED, "ink", subjects, everywhere)
    assert len(few.drawings) == 8
    assert len(many.drawings) == 160
    assert few.drawings == many.drawings[:8]
    assert few.prompts[0].endswith(", ink style")
    with pytest.raises(ValueError, match="'ink' has 3 drawings"):
        style_recipe(Regime.ENTANGLED, "ink", subjects[:3], everywhere)


def test_the_ceiling_sees_the_drawing_that_a_fusion_is_compared_with() -> None:
    recipe = true_recipe("penguin", "ink")
    assert recipe.stem == "fused-penguin-ink"
    assert recipe.drawings == (("penguin", "ink"),)
    assert recipe.prompts == ("a penguin, ink style",)


# The training.


@pytest.mark.slow
def test_drawings_that_are_not_moved_are_seen_where_they_are(
    pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    seen: list[torch.Tensor] = []

    def loss(pipe: Any, clean: torch.Tensor, texts: list[str]) -> torch.Tensor:
        seen.append(clean)
        return sum(w.sum() for w in pipe.unet.parameters() if w.requires_grad)

    monkeypatch.setattr(training, "flow_loss", loss)
    pictures = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    for moved in (True, False):
        train(pipe, pictures, ("a fox",), Plan(4, batch=2, rank=2, moved=moved))
        remove(pipe)
    clean = latents(pipe, pictures)
    assert all(torch.equal(part, clean.expand(2, -1, -1, -1)) for part in seen[4:])
    assert not all(torch.equal(part, clean.expand(2, -1, -1, -1)) for part in seen[:4])


@pytest.mark.slow
def test_a_lora_is_trained_saved_and_taken_off(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    path = lora_path(tmp_path, "subject", "fox")
    pictures = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(2):
        losses.append(train(pipe, pictures, ("a fox",), Plan(2, batch=1, rank=2)))
        save(pipe, path)
        remove(pipe)
    assert losses[0] == losses[1]
    after = pipe.unet.state_dict()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    layers = read_adapter(path).layers
    assert any("attn2" in name for name in layers)
    assert any("conv1" in name for name in layers)
    assert any(layer.up.any() for layer in layers.values())
    pipe.load_lora_weights(path, adapter_name="fox")
    assert pipe.unet.peft_config["fox"].r == 2
    pipe.unload_lora_weights()


def accepted(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *found: float, attempts: int = 2
) -> Any:
    """Train with trainings that reach these similarities; return the record and their plans."""
    folder.mkdir(exist_ok=True)
    plans: list[Plan] = []
    reached = iter(found)

    def trained(pipe: Any, pictures: Any, prompts: Any, plan: Plan) -> float:
        plans.append(plan)
        return 0.5

    monkeypatch.setattr(acceptance, "train", trained)
    monkeypatch.setattr(acceptance, "save", lambda _, path: path.write_bytes(bytes([len(plans)])))
    monkeypatch.setattr(acceptance, "remove", lambda pipe: None)
    monkeypatch.setattr(acceptance, "similarity", lambda *_: next(reached))
    pipe: Any = None
    judge = torch.Tensor.flatten
    entry = train_until_accepted(pipe, FOX, torch.zeros(1), Plan(100), folder, judge, attempts)
    return entry, plans


def test_a_subject_is_trained_again_and_longer_until_it_is_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entry, plans = accepted(monkeypatch, tmp_path, 0.4, 0.61)
    assert [(plan.updates, plan.seed) for plan in plans] == [(100, 0), (160, 1)]
    assert (entry.attempts, entry.updates, entry.similarity) == (2, 160, 0.61)
    assert entry.accepted
    assert Ledger(tmp_path).read() == {"subject-fox": entry}


def test_the_best_of_all_trainings_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry, plans = accepted(monkeypatch, tmp_path, 0.5, 0.3)
    assert len(plans) == 2
    assert (entry.attempts, entry.updates, entry.similarity) == (2, 100, 0.5)
    assert not entry.accepted
    assert lora_path(tmp_path, "subject", "fox").read_bytes() == b"\x01"


def test_more_trainings_go_on_from_those_of_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    accepted(monkeypatch, tmp_path, 0.5, 0.3)
    entry, plans = accepted(monkeypatch, tmp_path, 0.7, attempts=3)
    assert [(plan.updates, plan.seed) for plan in plans] == [(256, 2)]
    assert (entry.attempts, entry.updates, entry.similarity) == (3, 256, 0.7)
    same, plans = accepted(monkeypatch, tmp_path, attempts=4)
    assert (same, plans) == (entry, [])


def test_the_summary_counts_trainings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    at_once, _ = accepted(monkeypatch, tmp_path / "a", 0.9)
    later, _ = accepted(monkeypatch, tmp_path / "b", 0.1, 0.9)
    never, _ = accepted(monkeypatch, tmp_path / "c", 0.1, 0.1)
    entries = {"subject-a": at_once, "subject-b": later, "subject-c": never}
    assert summary(entries) == (
        "3 subject LoRAs: 1 reached 0.6 at once, 1 after they were trained again, "
        "1 did not and take no part: subject-c."
    )


# The command.


def test_names_of_loras_are_recipes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run, "drawing", lambda packages, package, name: torch.ones(3, 4, 4))
    monkeypatch.setattr(run, "things", lambda packages: [f"t{i}" for i in range(9)])
    every = run._recipes(tmp_path, Regime.ENTANGLED, ())
    assert len({recipe.stem for recipe in every}) == 54 + 5
    chosen = run._recipes(tmp_path, Regime.ENTANGLED, ("fused-penguin-ink", "style-mono"))
    assert [recipe.stem for recipe in chosen] == ["fused-penguin-ink", "style-mono"]
    for name in ("penguin", "subject-fox", "style-noto", "fused-penguin-noto"):
        with pytest.raises(ValueError, match=f"'{name}' is no LoRA of a held-out"):
            run._recipes(tmp_path, Regime.ENTANGLED, (name,))


def test_loras_that_are_there_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stub: Any = SimpleNamespace(
        from_pretrained=lambda path: SimpleNamespace(set_progress_bar_config=lambda disable: None),
        load=lambda path: SimpleNamespace(subject=None),
    )
    reached = {"penguin": 0.7, "octopus": 0.3}
    trained: list[str] = []

    def train_one(
        pipe: Any,
        recipe: Recipe,
        pictures: Any,
        plan: Plan,
        folder: Path,
        judge: Any,
        attempts: int,
    ) -> Entry:
        trained.append(recipe.name)
        assert not plan.moved  # a subject stays where it is
        lora_path(folder, "subject", recipe.name).parent.mkdir(parents=True, exist_ok=True)
        lora_path(folder, "subject", recipe.name).touch()
        found = reached[recipe.name]
        entry = Entry(attempts if found < 0.6 else 1, plan.updates, 0.5, found, "")
        Ledger(folder).add(recipe.stem, entry)
        return entry

    monkeypatch.setattr(run, "drawing", lambda *_: torch.ones(3, 4, 4))
    monkeypatch.setattr(run, "DiffusionPipeline", stub)
    monkeypatch.setattr(run, "Judges", stub)
    monkeypatch.setattr(run, "train_until_accepted", train_one)
    arguments = [*[str(tmp_path)] * 3, "entangled"]
    first = CliRunner().invoke(run.main, [*arguments, "subject-penguin"])
    assert (first.exit_code, trained) == (0, ["penguin"])
    both = CliRunner().invoke(run.main, [*arguments, "subject-penguin", "subject-octopus"])
    assert trained == ["penguin", "octopus"]
    assert "2 subject LoRAs: 1 reached 0.6 at once, 0 after" in both.output
    assert "1 did not and take no part: subject-octopus." in both.output
    more = [*arguments, "subject-penguin", "subject-octopus", "--attempts", "3"]
    assert CliRunner().invoke(run.main, more).exit_code == 0
    assert trained == ["penguin", "octopus", "octopus"]
    CliRunner().invoke(run.main, more)
    assert trained == ["penguin", "octopus", "octopus"]


def test_processes_can_share_a_folder_of_loras(tmp_path: Path) -> None:
    one, other = Ledger(tmp_path), Ledger(tmp_path)
    first, second = (Entry(1, 100, 0.5, reached, "") for reached in (0.7, None))
    assert (one.read(), other.read()) == ({}, {})
    one.add("subject-penguin", first)
    other.add("style-ink", second)
    assert one.read() == {"subject-penguin": first, "style-ink": second}
