"""LoRAs that always act: beside every rule, unseen by it, through every way of storing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click import unstyle
from support.compiling import rescheduled
from support.lora_files import peft_keys, random_pair, write_lora
from support.shipped import klora

from klora_compile import (
    ConfigError,
    Fusion,
    KloraError,
    PairingError,
    Settings,
    compile_fusion,
    compress,
    drop_unused,
    read_adapter,
    thin,
    verify_fusion,
)
from klora_compile.export import ExportSettings, export_static
from klora_compile.report.card import CardFacts, model_card
from klora_compile.report.plot import plot_schedule
from klora_compile.report.schedule_map import text_map
from klora_compile.rules import Klora
from klora_compile.settings.config import Config
from klora_compile.sources import by_source
from klora_runtime import load_fusion, save_fusion
from klora_runtime.artifact.beside import beside
from klora_runtime.artifact.timeline import Timeline
from klora_runtime.errors import ArtifactError

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
QUERY, KEY, OUT = (f"{BLOCK}.to_{name}" for name in ("q", "k", "out.0"))
TEXT = "text_encoder.encoder.layers.0.self_attn.q_proj"
RULES: dict[str, dict[str, Any]] = {
    "klora": {"bias": 0.1},
    "soft": {"sharpness": 2.0},
    "groups": {"table": {"style *.to_k": "0:0.5,0.5:1"}},
    "est": {"d": 0.3},
    "np": {},
    "np+klora": {},
    "direct": {},
    "level": {},
    "switch": {"steps": 12},
    "phases": {"content_phases": "0:1,0.5:0"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA that always acts has a layer of both, two of its own, and a text encoder's."""
    folder = tmp_path_factory.mktemp("files")
    layers = {"content": (QUERY, KEY, TEXT), "style": (QUERY, KEY), "turbo": (QUERY, OUT, TEXT)}
    found = {}
    for seed, (name, own) in enumerate(layers.items()):
        pairs = {
            layer: random_pair(32, 32, 2 + seed, seed=10 * seed + place)
            for place, layer in enumerate(own)
        }
        tensors = peft_keys(pairs) | {f"{layer}.alpha": torch.tensor(1.5) for layer in own}
        found[name] = write_lora(folder / f"{name}.safetensors", tensors)
    return found


def fused(files: dict[str, Path], rule: str = "klora", **settings: Any) -> Fusion:
    config = Config.named(rule, **(RULES[rule] | settings))
    return compile_fusion(
        files["content"],
        files["style"],
        config.rule,
        config.settings,
        always={"turbo": files["turbo"]},
        device="cpu",
    )


@pytest.fixture(scope="module")
def whole(files: dict[str, Path]) -> Fusion:
    return fused(files, weights={"turbo": 0.5})


def saved(fusion: Fusion, folder: Path) -> Path:
    path = folder / "x.klora.safetensors"
    save_fusion(fusion, path, overwrite=True)
    return path


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_sees_it(files: dict[str, Path], rule: str) -> None:
    config = Config.named(rule, **RULES[rule])
    plain = compile_fusion(
        files["content"], files["style"], config.rule, config.settings, device="cpu"
    )
    fusion = fused(files, rule, weights={"turbo": 0.5})
    assert fusion.rule.derived == plain.rule.derived
    assert {name: slot.role for name, slot in fusion.slots.items()} == {
        "content": "content", "style": "style", "turbo": "always"
    }  # fmt: skip
    found = {entry.layer: entry for entry in fusion.entries}
    for entry in plain.entries:
        own = found[entry.layer]
        assert own.timeline.starts == entry.timeline.starts
        for slot in ("content", "style"):
            assert own.timeline.coefficients[slot] == entry.timeline.coefficients[slot]
            if slot in entry.factors:
                assert torch.equal(own.factors[slot].delta.up, entry.factors[slot].delta.up)
    for layer in (QUERY, OUT, TEXT):
        entry, turbo = found[layer], read_adapter(files["turbo"]).layers[layer]
        assert set(entry.timeline.coefficients["turbo"]) == {0.5}
        assert entry.factors["turbo"].scale == turbo.scaling == 1.5 / 4
        assert torch.equal(entry.factors["turbo"].delta.down, turbo.delta.down)
    assert not found[KEY].timeline.uses("turbo")
    assert found[OUT].fate == "always"
    assert found[TEXT].timeline.at(0.5) == {"content": 1.0, "style": 0.0, "turbo": 0.5}


def test_authors_semantics_leave_its_alpha(files: dict[str, Path]) -> None:
    fusion = fused(files, semantics="authors")
    scales = {e.layer: {s: f.scale for s, f in e.factors.items()} for e in fusion.entries}
    assert scales[QUERY] == {"content": 1.0, "style": 1.0, "turbo": 1.5 / 4}


def test_it_stays_through_every_way_of_storing(
    whole: Fusion, files: dict[str, Path], tmp_path: Path
) -> None:
    sources = by_source(files["content"], files["style"], {"turbo": files["turbo"]})
    for fusion in (whole, thin(whole, sources), compress(whole, 0.01), drop_unused(whole)):
        read = load_fusion(saved(fusion, tmp_path), check="full")
        assert verify_fusion(read, sources) == []
        assert read.slots["turbo"].role == "always"
    again = rescheduled(load_fusion(saved(whole, tmp_path)), "direct", weights={"turbo": 0.25})
    wanted = fused(files, "direct", weights={"turbo": 0.25})
    for one, other in zip(again.entries, wanted.entries, strict=True):
        assert (one.fate, one.timeline, set(one.factors)) == (
            other.fate, other.timeline, set(other.factors)
        )  # fmt: skip
    back = rescheduled(again, "klora", bias=0.1, weights={"turbo": 0.5})
    assert saved(back, tmp_path).read_bytes() == saved(whole, tmp_path).read_bytes()


def test_exports_add_it(whole: Fusion, files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    export_static(whole, path, ExportSettings(keys="peft"))
    found, turbo = read_adapter(path).layers, read_adapter(files["turbo"]).layers
    own = found[OUT]
    assert torch.allclose(
        own.scaling * own.delta.matrix(),
        0.5 * turbo[OUT].scaling * turbo[OUT].delta.matrix(),
        atol=1e-5,
    )
    plain = rescheduled(whole, weights={"turbo": 0.0})
    export_static(plain, tmp_path / "plain.safetensors", ExportSettings(keys="peft"))
    without = read_adapter(tmp_path / "plain.safetensors").layers[QUERY]
    added = found[QUERY].scaling * found[QUERY].delta.matrix()
    added = added - without.scaling * without.delta.matrix()
    wanted = 0.5 * turbo[QUERY].scaling * turbo[QUERY].delta.matrix()
    assert torch.allclose(added, wanted, atol=1e-5)


def test_reports_show_it(whole: Fusion, tmp_path: Path) -> None:
    text = text_map(whole, 40)
    assert "+ turbo (at every step)" in text
    assert "█ content" in text
    plot_schedule(whole, tmp_path / "map.png")
    assert "turbo" in whole._repr_html_()
    card = model_card(whole, CardFacts("x.klora.safetensors", 1, "0" * 64))
    assert "A LoRA of a subject, a LoRA of a style and a LoRA that always acts in one file" in card


def test_one_lora_alone_and_beside(files: dict[str, Path]) -> None:
    alone = compile_fusion(files["turbo"], device="cpu")
    assert (alone.rule.name, set(alone.slots)) == ("direct", {"content"})
    assert {entry.timeline.at(0.9)["content"] for entry in alone.entries} == {1.0}
    for unpaired in ("drop", "error"):
        other = compile_fusion(files["turbo"], settings=Settings(unpaired=unpaired), device="cpu")
        assert [e.timeline for e in other.entries] == [e.timeline for e in alone.entries]
    two = compile_fusion(files["content"], always={"turbo": files["turbo"]}, device="cpu")
    assert (two.rule.name, set(two.slots)) == ("direct", {"content", "turbo"})
    joined = beside(compile_fusion(files["content"], device="cpu"), {"turbo": alone})
    for one, added in zip(two.entries, joined.entries, strict=True):
        assert (one.path, one.timeline) == (added.path, added.timeline)
        assert one.factors.keys() == added.factors.keys()


def test_commands_take_a_weight(files: dict[str, Path], whole: Fusion, tmp_path: Path) -> None:
    path = tmp_path / "a.klora.safetensors"
    pair = ("compile", files["content"], files["style"], "-o", path, "--bias", 0.1)
    made = klora(*pair, "--always", f"turbo={files['turbo']}:0.5")
    assert made.exit_code == 0, made.stderr
    assert "turbo in 3 layers, weight 0.5" in made.stdout
    assert path.read_bytes() == saved(whole, tmp_path).read_bytes()
    other = ("--always", f"turbo={files['turbo']}", "--weight", "turbo=0.5", "--force")
    assert klora(*pair, *other).exit_code == 0
    assert path.read_bytes() == saved(whole, tmp_path).read_bytes()
    assert klora("recompile", path, "-o", tmp_path / "b", "--weight", "turbo=0.2").exit_code == 0
    assert load_fusion(tmp_path / "b").rule.parameters["weights"] == {"turbo": 0.2}
    checked = klora("verify", path, "--against", *files.values())
    assert checked.exit_code == 0, checked.stderr
    one = klora("compile", files["turbo"], "-o", tmp_path / "turbo.klora.safetensors")
    assert one.exit_code == 0, one.stderr


@pytest.mark.parametrize(
    ("named", "text"),
    [
        (("turbo",), "'turbo' is not NAME=FILE[:WEIGHT]"),
        (("turbo={turbo}:0.5", "turbo={turbo}"), "--always names turbo twice"),
        (("turbo={turbo}:x",), "does not exist"),
        (("Turbo={turbo}",), "always: Turbo is no name for a LoRA that always acts"),
        (("enabled={turbo}",), "always: enabled is no name"),
        (("style={turbo}",), "always: style is no name for a LoRA that always acts"),
        (("turbo.high={turbo}",), "always: turbo.high is no name for a LoRA that always acts"),
        (("turbo={style}",), "are one file"),
    ],
)
def test_what_always_cannot_be_is_refused(
    named: tuple[str, ...], text: str, files: dict[str, Path], tmp_path: Path
) -> None:
    options = [part for each in named for part in ("--always", each.format(**files))]
    refused = klora("compile", files["content"], files["style"], "-o", tmp_path / "x", *options)
    assert refused.exit_code == 2
    assert text in refused.stderr


def test_python_refuses_the_same(files: dict[str, Path]) -> None:
    for always, text in (
        ({"turbo.low": files["turbo"]}, "turbo.low is no name"),
        ({1: files["turbo"]}, "1 is no name"),
        ([files["turbo"]], "expected names with a LoRA each"),
    ):
        with pytest.raises(ConfigError, match=text):
            compile_fusion(files["content"], files["style"], always=always)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["high", "low"])
def test_it_may_have_the_name_of_a_half(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    sources = by_source(files["content"], files["style"], {name: files["turbo"]})
    fusion = compile_fusion(
        files["content"], files["style"], always={name: files["turbo"]}, device="cpu"
    )
    assert fusion.slots[name].sources == (name,)
    assert fusion.slots[name].role == "always"
    assert {entry.component for entry in fusion.entries} == {"unet", "text_encoder"}
    assert verify_fusion(load_fusion(saved(fusion, tmp_path)), sources) == []
    assert [e.timeline for e in rescheduled(fusion).entries] == [e.timeline for e in fusion.entries]


def test_those_to_verify_against_follow_by_name(files: dict[str, Path], tmp_path: Path) -> None:
    pair, path = (files["content"], files["style"]), tmp_path / "x.klora.safetensors"
    extra = write_lora(tmp_path / "e.safetensors", peft_keys({OUT: random_pair(32, 32, 2)}))
    named = ("--always", f"turbo={files['turbo']}", "--always", f"extra={extra}")
    assert klora("compile", *pair, *named, "-o", path).exit_code == 0
    assert klora("verify", path, "--against", *pair, extra, files["turbo"]).exit_code == 0
    assert "those that always act, by name" in " ".join(klora("verify", "--help").output.split())
    refused = klora("verify", path, "--against", *pair, extra)
    assert "(content, style, extra, turbo), 3 were named; name all of them in this order." in (
        refused.stderr
    )


def test_a_new_schedule_needs_its_scores(whole: Fusion) -> None:
    """Without them the LoRA would be left out in silence."""
    entries = [
        replace(entry, scores={"klora": {**entry.scores["klora"], "turbo": None}})
        for entry in whole.entries
    ]
    with pytest.raises(KloraError, match="no usable scores of rule klora"):
        rescheduled(replace(whole, entries=tuple(entries)), bias=0.3)


def test_a_map_of_one_lora_shows_its_letter(files: dict[str, Path]) -> None:
    alone = unstyle(text_map(compile_fusion(files["turbo"], device="cpu"), 40))
    assert "A" * 40 in alone
    assert "alike" not in alone


def test_a_card_of_one_lora_says_nothing_of_several(files: dict[str, Path]) -> None:
    alone = compile_fusion(files["turbo"], device="cpu")
    card = model_card(alone, CardFacts("x.klora.safetensors", 1, "0" * 64))
    assert "A LoRA of a subject in one file, with its schedule: it holds for any prompt" in card
    assert "fused by" not in card


@pytest.mark.parametrize("drop", [False, True])
def test_it_acts_beside_what_a_setting_left_out(
    drop: bool, files: dict[str, Path], tmp_path: Path
) -> None:
    """With the fate that compiling all of them together gives."""
    settings = Settings(text_encoder="none")
    pair = compile_fusion(files["content"], files["style"], settings=settings, device="cpu")
    alone = compile_fusion(files["turbo"], device="cpu")
    joined = beside(drop_unused(pair) if drop else pair, {"turbo": alone})
    read = load_fusion(saved(joined, tmp_path))
    together = fused(files, bias=0.0, text_encoder="none")
    assert {e.layer: e.fate for e in read.entries} == {e.layer: e.fate for e in together.entries}
    assert {e.layer: e.fate for e in read.entries}[TEXT] == "always"


def test_a_weight_is_said_once(files: dict[str, Path], tmp_path: Path) -> None:
    refused = klora(
        "compile", files["content"], files["style"], "-o", tmp_path / "x",
        "--always", f"turbo={files['turbo']}:0.5", "--weight", "turbo=1",
    )  # fmt: skip
    assert "the weight of turbo is in --always and in --weight" in refused.stderr


def test_another_base_model_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    other = write_lora(tmp_path / "o.safetensors", peft_keys({QUERY: random_pair(32, 16, 2)}))
    with pytest.raises(PairingError, match="1 layers have two shapes") as caught:
        compile_fusion(files["content"], files["style"], always={"turbo": other}, device="cpu")
    assert "[32, 16] in TURBO" in caught.value.issues[0]


def test_roles_that_names_do_not_say_are_refused(whole: Fusion) -> None:
    slots = {**whole.slots, "turbo": replace(whole.slots["turbo"], role="style")}
    with pytest.raises(ConfigError, match="turbo has the role style, and its name does not say so"):
        rescheduled(replace(whole, slots=slots), bias=0.3)


def test_a_rule_still_needs_its_loras(files: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="rule klora needs two LoRAs or more, found 1"):
        compile_fusion(files["content"], rule=Klora(), always={"turbo": files["turbo"]})


def test_a_slot_that_always_acts_must_not_change(whole: Fusion, tmp_path: Path) -> None:
    place, entry = next((i, e) for i, e in enumerate(whole.entries) if e.timeline.uses("turbo"))
    coefficients = dict.fromkeys(entry.timeline.coefficients, (0.0, 0.0)) | {"turbo": (0.5, 0.25)}
    changed = replace(entry, timeline=Timeline((0.0, 0.5), coefficients))
    entries = (*whole.entries[:place], changed, *whole.entries[place + 1 :])
    with pytest.raises(ArtifactError) as caught:
        save_fusion(replace(whole, entries=entries), tmp_path / "x")
    assert "turbo: always acts, so its coefficient must not change" in str(caught.value)
