"""LoRAs in two files, one for high and one for low noise: fused in one go, as Wan 2.2 has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.compiling import rescheduled
from support.families import FamilyCase, lora_files
from support.lora_files import peft_keys, random_pair, write_lora
from support.shipped import klora
from support.video_families import VIDEOS

from klora_compile import (
    ConfigError,
    Fusion,
    Halves,
    LoraError,
    PairingError,
    Settings,
    compile_fusion,
    compress,
    read_adapter,
    thin,
    verify_fusion,
)
from klora_compile.halves import halves_of, refuse_separated
from klora_compile.rules import NpLora
from klora_compile.settings.read_options import ReadOptions
from klora_runtime import apply_fusion, load_fusion, save_fusion
from klora_runtime.artifact.beside import beside

#: Of diffusers' names -> of the authors', which trainers write.
NAMES = {"attn1.": "self_attn.", "attn2.": "cross_attn.", "to_out.0.": "o."} | {
    f".to_{letter}.": f".{letter}." for letter in "qkv"
}
(CASE,) = (case for case in VIDEOS if case.name == "Wan 2.2")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A content and a style LoRA that hold the layers of both denoisers, in diffusers' names."""
    return lora_files(CASE.pipeline(), CASE, tmp_path_factory.mktemp("together"))


@pytest.fixture(scope="module")
def halves(together: tuple[Path, Path]) -> dict[str, Path]:
    """The same LoRAs as trainers write them: two files with equal names of layers."""
    folder = together[0].parent
    (folder / "low_noise").mkdir()
    files = {
        "content.high": folder / "fox_000002000_high_noise.safetensors",
        "content.low": folder / "fox_000002000_low_noise.safetensors",
        "style.high": folder / "Wan22-Ink-HIGH-v1.safetensors",
        "style.low": folder / "low_noise" / "ink.safetensors",
    }
    for source, path in files.items():
        slot, _, half = source.partition(".")
        denoiser = "transformer." if half == "high" else "transformer_2."
        own = {}
        for key, tensor in load_file(str(together[slot == "style"])).items():
            if key.startswith(denoiser):
                name = key.removeprefix(denoiser)
                for one, other in NAMES.items():
                    name = name.replace(one, other)
                own[f"diffusion_model.{name}"] = tensor
        save_file(own, str(path))
    return files


def pairs(halves: dict[str, Path]) -> list[Halves[Path]]:
    return [Halves(halves[f"{slot}.high"], halves[f"{slot}.low"]) for slot in ("content", "style")]


@pytest.fixture(scope="module")
def fusion(halves: dict[str, Path]) -> Fusion:
    return compile_fusion(*pairs(halves), device="cpu")


def saved(fusion: Fusion, folder: Path) -> Path:
    path = folder / "x.klora.safetensors"
    save_fusion(fusion, path, overwrite=True)
    return path


@pytest.mark.parametrize("mode", ["merge", "branch"])
def test_it_acts_as_loras_of_both_denoisers(
    mode: str, fusion: Fusion, together: tuple[Path, Path]
) -> None:
    """With one clock over both: the second denoiser goes on where the first one ends."""
    pipe = CASE.pipeline()
    bare = CASE.generate(pipe)
    with apply_fusion(pipe, compile_fusion(*together, device="cpu"), mode):
        expected = CASE.generate(pipe)
    with apply_fusion(pipe, fusion, mode) as handle:
        assert torch.equal(CASE.generate(pipe), expected)
        assert handle.report().components == ("transformer", "transformer_2")
    assert not torch.allclose(bare, expected)


def test_one_slot_has_two_sources(fusion: Fusion, halves: dict[str, Path]) -> None:
    assert set(fusion.slots) == {"content", "style"}
    assert fusion.slots["content"].sources == ("content.high", "content.low")
    assert {name: source.file for name, source in fusion.sources.items()} == {
        name: path.name for name, path in halves.items()
    }
    notes = {name: source.notes.get("denoiser") for name, source in fusion.sources.items()}
    assert notes == {
        "content.high": None, "content.low": "transformer_2",
        "style.high": None, "style.low": "transformer_2",
    }  # fmt: skip
    assert set(fusion.rule.derived["gamma"]) == {"transformer", "transformer_2"}
    derived = compile_fusion(*pairs(halves), NpLora(), device="cpu")
    assert derived.slots["content"].sources == tuple(halves)


def test_every_way_of_storing_knows_both(
    fusion: Fusion, halves: dict[str, Path], tmp_path: Path
) -> None:
    by_slot = dict(zip(("content", "style"), pairs(halves), strict=True))
    for each in (fusion, compress(fusion, 0.01), thin(fusion, by_slot)):
        assert verify_fusion(load_fusion(saved(each, tmp_path)), by_slot) == []
    filled = load_fusion(saved(thin(fusion, by_slot), tmp_path), sources=halves)
    assert saved(filled, tmp_path).read_bytes() == saved(fusion, tmp_path).read_bytes()
    swapped = Halves(by_slot["content"].low, by_slot["content"].high)
    assert verify_fusion(fusion, by_slot | {"content": swapped}) != []


def test_commands_take_both_files(fusion: Fusion, halves: dict[str, Path], tmp_path: Path) -> None:
    """In either order, where names or folders say which is which."""
    wanted, path = saved(fusion, tmp_path).read_bytes(), tmp_path / "a.klora.safetensors"
    content, style = (
        f"{halves['content.low']},{halves['content.high']}",
        f"{halves['style.high']},{halves['style.low']}",
    )
    made = klora("compile", content, style, "-o", path)
    assert made.exit_code == 0, made.stderr
    assert path.read_bytes() == wanted
    again = ("--content", content, "--style", style, "--halves", "low,high", "--force")
    refused = klora("compile", *again, "-o", path)
    assert "say high,low; leave --halves out" in refused.stderr
    checked = klora("verify", path, "--against", content, style)
    assert checked.exit_code == 0, checked.stderr


def test_names_that_do_not_say_it_need_an_option(
    fusion: Fusion, halves: dict[str, Path], tmp_path: Path
) -> None:
    plain = []
    for name in ("a", "b"):
        source = halves["style.high" if name == "a" else "style.low"]
        plain.append(tmp_path / f"{name}.safetensors")
        plain[-1].write_bytes(source.read_bytes())
    content = f"{halves['content.high']},{halves['content.low']}"
    command = ("compile", "--style", f"{plain[0]},{plain[1]}", "-o", tmp_path / "x")
    refused = klora(*command, "--content", content)
    assert refused.exit_code == 2
    assert "says high or low noise; add --halves high,low" in refused.stderr
    made = klora(*command, "--content", content, "--halves", "high,low")
    assert made.exit_code == 0, made.stderr
    found, expected = load_fusion(tmp_path / "x"), fusion
    assert [e.timeline for e in found.entries] == [e.timeline for e in expected.entries]


@pytest.mark.parametrize(
    ("one", "other", "order"),
    [
        ("a_high_noise", "a_low_noise", "high,low"),
        ("a-LOW", "a-HIGH", "low,high"),
        ("HighNoise", "rest", "high,low"),
        ("highlights_lownoise", "x", "low,high"),
        ("flow_a", "flow_b", "neither"),
        ("low_a", "low_b", "both"),
        ("low_high", "x", "neither"),
    ],
)
def test_what_names_say(one: str, other: str, order: str, tmp_path: Path) -> None:
    files = [tmp_path / "files" / f"{name}.safetensors" for name in (one, other)]
    if order in ("neither", "both"):
        with pytest.raises(ConfigError, match=f"{order} "):
            halves_of(*files)
        return
    found = halves_of(*files)
    assert [found.high, found.low] == (files if order == "high,low" else files[::-1])


def test_an_option_says_what_names_say_of_both(tmp_path: Path) -> None:
    """Such as a folder of high quality."""
    one, other = (tmp_path / "high_quality" / f"{name}.safetensors" for name in "ab")
    with pytest.raises(ConfigError, match=r"both say high noise; .*, or add --halves"):
        halves_of(one, other)
    assert halves_of(one, other, ("low", "high")) == Halves(other, one)


@pytest.mark.parametrize(
    ("one", "other", "refused"),
    [
        ("fox_high_noise", "fox_low_noise", True),
        ("Fox-HIGH-v1", "fox_low_v1", True),
        ("high", "low", True),
        ("fox_high", "ink_low", False),
        ("fox_high", "fox_high_2", False),
        ("fox_high", "fox_flow", False),
        ("a/high", "b/low", False),
    ],
)
def test_the_two_files_of_a_lora_are_no_content_and_style(
    one: str, other: str, refused: bool
) -> None:
    files = [Path(f"{name}.safetensors") for name in (one, other)]
    for order in (files, files[::-1]):
        if refused:
            with pytest.raises(ConfigError, match="look like the two files of one LoRA; join them"):
                refuse_separated(order)
        else:
            refuse_separated(order)


def test_a_space_for_the_comma_is_told(halves: dict[str, Path], tmp_path: Path) -> None:
    pair, path = (halves["content.high"], halves["content.low"]), tmp_path / "x"
    found = klora("compile", *pair, "-o", path)
    assert found.exit_code == 2
    assert "look like the two files of one LoRA" in found.stderr
    assert not path.exists()
    with pytest.raises(ConfigError, match="look like the two files of one LoRA"):
        compile_fusion(*pair)


def test_an_order_of_no_two_files_is_refused(halves: dict[str, Path], tmp_path: Path) -> None:
    pair = (halves["content.high"], halves["style.high"])
    path, order = tmp_path / "x.klora.safetensors", ("--halves", "high,low")
    text = "--halves: no LoRA is named as two files HIGH,LOW; leave it out."
    assert text in klora("compile", *pair, "-o", path, *order).stderr
    assert klora("compile", *pair, "-o", path).exit_code == 0
    assert text in klora("verify", path, "--against", *pair, *order).stderr


def test_one_file_for_both_denoisers(halves: dict[str, Path], tmp_path: Path) -> None:
    """A LoRA of Wan 2.1 on Wan 2.2."""
    one, two = halves["content.high"], halves["style.high"]
    path = tmp_path / "x"
    assert klora("compile", one, two, "--both-denoisers", "-o", path).exit_code == 0
    fusion = load_fusion(path)
    by_component: dict[str, dict[str, Any]] = {"transformer": {}, "transformer_2": {}}
    for entry in fusion.entries:
        by_component[entry.component][entry.module] = entry.timeline
    assert by_component["transformer"] == by_component["transformer_2"] != {}
    assert klora("verify", path, "--against", one, two).exit_code == 0
    assert klora("compile", f"{one},{one}", f"{two},{two}", "-o", path, "--force").exit_code == 0
    again = load_fusion(path)
    assert [e.timeline for e in again.entries] == [e.timeline for e in fusion.entries]


def test_each_half_of_an_accelerator_has_its_weight(
    halves: dict[str, Path], tmp_path: Path
) -> None:
    turbo = {}
    for half in ("high", "low"):
        turbo[half] = tmp_path / f"turbo_{half}.safetensors"
        turbo[half].write_bytes(halves[f"style.{half}"].read_bytes() + b"")
        tensors = {key: 2 * tensor for key, tensor in load_file(str(turbo[half])).items()}
        save_file(tensors, str(turbo[half]))
    path = tmp_path / "x.klora.safetensors"
    content, style = (
        f"{halves[f'{slot}.high']},{halves[f'{slot}.low']}" for slot in ("content", "style")
    )
    named = f"turbo={turbo['low']}:0.6,{turbo['high']}:0.8"
    made = klora("compile", content, style, "--always", named, "-o", path)
    assert made.exit_code == 0, made.stderr
    assert "turbo in 54 layers, weight 0.8 for high and 0.6 for low noise" in made.stdout
    fusion = load_fusion(path)
    assert fusion.rule.parameters["weights"] == {"turbo.high": 0.8, "turbo.low": 0.6}
    assert fusion.slots["turbo"].sources == ("turbo.high", "turbo.low")
    for entry in fusion.entries:
        wanted = 0.8 if entry.component == "transformer" else 0.6
        assert set(entry.timeline.coefficients["turbo"]) == {wanted}
    other = rescheduled(fusion, weights={"turbo.low": 1.0, "content.high": 0.5})
    found = {e.component: e.timeline.coefficients["turbo"][0] for e in other.entries}
    assert found == {"transformer": 0.8, "transformer_2": 1.0}
    alone = compile_fusion(Halves(turbo["high"], turbo["low"]), device="cpu")
    joined = beside(compile_fusion(*pairs(halves), device="cpu"), {"turbo": alone})
    assert joined.slots["turbo"].sources == ("turbo.high", "turbo.low")
    assert set(joined.sources) == {*halves, "turbo.high", "turbo.low"}


def test_halves_of_one_denoiser_are_refused(
    halves: dict[str, Path], together: tuple[Path, Path]
) -> None:
    with pytest.raises(PairingError, match="both halves of content change") as caught:
        compile_fusion(Halves(together[0], halves["content.low"]), together[1], device="cpu")
    assert caught.value.issues
    with pytest.raises(ConfigError, match=r"weights: expected .*, found .turbo\.low."):
        compile_fusion(*pairs(halves), settings=Settings(weights={"turbo.low": 1.0}), device="cpu")


def test_a_weight_of_a_half_that_a_lora_lacks_is_refused(
    halves: dict[str, Path], fusion: Fusion
) -> None:
    """It would be ignored."""
    one, other = halves["content.high"], halves["style.high"]
    text = "weights: the LoRA content changes no denoiser for low noise; leave content.low out"
    with pytest.raises(ConfigError, match=text):
        compile_fusion(one, other, settings=Settings(weights={"content.low": 0.5}), device="cpu")
    single = compile_fusion(one, other, device="cpu")
    with pytest.raises(ConfigError, match=text):
        rescheduled(single, weights={"content.low": 0.5})
    assert rescheduled(single, weights={"content.high": 0.5}).entries
    assert rescheduled(fusion, weights={"content.low": 0.5}).entries


def test_a_denoiser_is_named_for_loras_in_one_file(halves: dict[str, Path]) -> None:
    options, low = ReadOptions(denoiser="transformer_2"), halves["style.low"]
    with pytest.raises(ConfigError, match=r"half by half; leave --denoiser out"):
        compile_fusion(*pairs(halves), options=options, device="cpu")
    mixed = compile_fusion(pairs(halves)[0], low, options=options, device="cpu")
    fates = {entry.fate for entry in mixed.entries if entry.component == "transformer"}
    assert fates == {"one-sided"}


def test_a_lora_of_a_model_with_one_denoiser_is_not_for_both(tmp_path: Path) -> None:
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    loras = [
        write_lora(tmp_path / f"{seed}.safetensors", peft_keys({layer: random_pair(8, 8, 2)}))
        for seed in (1, 2)
    ]
    refused = klora("compile", *loras, "--both-denoisers", "-o", tmp_path / "x")
    assert refused.exit_code == 1
    assert "is named for both denoisers, and 1 of its layers are in no second denoiser" in (
        refused.stderr
    )
    assert "without --both-denoisers." in refused.stderr


def test_a_file_of_both_denoisers_needs_no_option(
    together: tuple[Path, Path], tmp_path: Path
) -> None:
    command = ("compile", *together, "-o", tmp_path / "x")
    assert klora(*command).exit_code == 0
    refused = klora(*command, "--both-denoisers", "--force")
    assert refused.exit_code == 1
    assert "nor --both-denoisers; leave the option out" in refused.stderr
    assert "for 1 reason." in refused.stderr


def test_a_layer_that_a_half_has_twice_is_named(halves: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(str(halves["content.low"]))
    name = next(key for key in tensors if key.endswith("self_attn.q.lora_A.weight"))
    stem = name.removesuffix(".lora_A.weight")
    other = stem.replace("diffusion_model.", "transformer.").replace("self_attn.q", "attn1.to_q")
    for side in "AB":
        tensors[f"{other}.lora_{side}.weight"] = tensors[f"{stem}.lora_{side}.weight"].clone()
    twice = tmp_path / "twice_low.safetensors"
    save_file(tensors, str(twice))
    with pytest.raises(LoraError) as caught:
        compile_fusion(Halves(halves["content.high"], twice), pairs(halves)[1], device="cpu")
    assert "twice, here and in" in caught.value.issues[0]


def test_a_lora_of_one_file_beside_halves_changes_the_first(
    halves: dict[str, Path], fusion: Fusion
) -> None:
    content, _ = pairs(halves)
    mixed = compile_fusion(content, read_adapter(halves["style.high"]), device="cpu")
    fates = {entry.fate for entry in mixed.entries if entry.component == "transformer_2"}
    assert fates == {"one-sided"}
    first = [e.timeline for e in mixed.entries if e.component == "transformer"]
    assert first == [e.timeline for e in fusion.entries if e.component == "transformer"]


def test_the_case_is_wan() -> None:
    assert isinstance(CASE, FamilyCase)
    assert set(CASE.ran) == {"transformer", "transformer_2"}
