"""``klora inspect LORA``: what people and programs see of a plain LoRA file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from support.form_files import DORA_LAYER, small_dora
from support.lora_files import needs_real_loras, peft_keys, random_pair, real_lora

from klora_compile.cli import main
from klora_compile.report.lora import block_of

TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TO_K = TO_Q.replace("to_q", "to_k")


def inspect(path: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["inspect", str(path), *options])


def described(path: Path, *options: str) -> dict[str, Any]:
    result = inspect(path, "--json", *options)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def write(path: Path, tensors: Mapping[str, torch.Tensor], **metadata: str) -> Path:
    save_file(dict(tensors), str(path), metadata=metadata or None)
    return path


def two_layers() -> dict[str, torch.Tensor]:
    tensors = peft_keys({TO_Q: random_pair(6, 4, 2), TO_K: random_pair(6, 768, 3)})
    return tensors | {f"{TO_Q}.alpha": torch.tensor(1.0)}


def test_one_object_for_programs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", two_layers(), trigger_word="sks", license="mit")
    found = described(path, "--norms")
    norms = found.pop("norms")
    assert described(path) == {**found, "norms": None}
    assert found == {
        "schema": 1,
        "kind": "lora",
        "family": None,
        "families": [],
        "layout": "peft",
        "names": "diffusers",
        "trainer": None,
        "license": "mit",
        "keys": 5,
        "used": 5,
        "unused": [],
        "problems": [],
        "needs_base": False,
        "trigger_words": ["sks"],
        "layers": [
            {
                "name": TO_K,
                "form": "lora",
                "rank": 3,
                "alpha": 3.0,
                "alpha_source": "rank",
                "shape": [6, 768],
            },
            {
                "name": TO_Q,
                "form": "lora",
                "rank": 2,
                "alpha": 1.0,
                "alpha_source": "tensor",
                "shape": [6, 4],
            },
        ],
    }
    tensors = two_layers()
    squares = [
        (scale * tensors[f"{n}.lora_B.weight"] @ tensors[f"{n}.lora_A.weight"]).square().sum()
        for n, scale in ((TO_Q, 0.5), (TO_K, 1.0))
    ]
    assert norms == {"unet.down_blocks.0": pytest.approx(float(sum(squares)) ** 0.5)}


def test_lines_for_people(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.safetensors",
        two_layers(),
        ss_network_module="networks.lora",
        ss_tag_frequency=json.dumps({"10_fox": {"sks fox": 7, "forest": 3}}),
    )
    text = inspect(path, "--norms").output
    assert inspect(path).output == text.partition("  norms")[0]
    for line in (
        "base model     an unknown family",
        "layout         peft",
        "trainer        sd-scripts",
        "trigger words  sks fox",
        "licence        not stated",
        "keys           5 of 5 used",
        "layers (2)         2 unet, lora, linear",
        "ranks          2/3",
        "alpha          3, from rank",
        "               1, from tensor",
        "unet.down_blocks.0",
    ):
        assert line in text


@pytest.mark.parametrize("as_json", [True, False])
def test_what_cannot_be_compiled_is_shown_and_exits_with_1(as_json: bool, tmp_path: Path) -> None:
    tensors = two_layers() | {"lora_unet_mystery.lora_up.weight\x1b[2J": torch.ones(1)}
    result = inspect(write(tmp_path / "a.safetensors", tensors), *(["--json"] if as_json else []))
    assert result.exit_code == 1
    assert "1 of 6 keys cannot be used" in result.stderr
    assert "\x1b" not in result.output
    why = "its ending belongs to no known form of LoRA"
    if as_json:
        found = json.loads(result.stdout)
        assert (found["keys"], found["used"]) == (6, 5)
        (unused,) = found["unused"]
        assert unused == {"key": "lora_unet_mystery.lora_up.weight\x1b[2J", "why": why}
        assert len(found["layers"]) == 2
        assert found["norms"] is None
    else:
        assert rf"unused: lora_unet_mystery.lora_up.weight\x1b[2J: {why}" in result.stdout


def test_values_are_looked_at_only_for_norms(tmp_path: Path) -> None:
    tensors = two_layers() | {f"{TO_Q}.lora_A.weight": torch.full((2, 4), torch.nan)}
    path = write(tmp_path / "a.safetensors", tensors)
    assert described(path)["norms"] is None
    result = inspect(path, "--json", "--norms")
    assert result.exit_code == 1
    assert "holds NaN or infinity" in result.stderr
    assert json.loads(result.stdout)["used"] == 5


def test_a_file_that_cannot_be_opened_gives_an_error_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"<html>")
    result = inspect(path, "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "is a web page, not a safetensors file" in result.stderr


def test_dora_is_shown_without_a_base_and_computed_with_one(tmp_path: Path) -> None:
    path, base = small_dora(tmp_path)
    result = inspect(path, "--json")
    assert result.exit_code == 1
    assert "Name the base model with --base PATH" in result.stderr
    found = json.loads(result.stdout)
    assert (found["needs_base"], found["norms"]) == (True, None)
    assert [(layer["name"], layer["form"]) for layer in found["layers"]] == [(DORA_LAYER, "dora")]
    assert "needs          the base model's weights: --base PATH" in inspect(path).stdout
    assert described(path, "--base", str(base))["norms"] is None
    assert described(path, "--base", str(base), "--norms")["norms"] is not None


def test_what_is_wrong_is_in_the_object_too(tmp_path: Path) -> None:
    """A disputed alpha is shown with its layer; half a pair is no layer."""
    tensors = two_layers() | {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3)}
    config = json.dumps({"lora_alpha": 9, "alpha_pattern": {"to_k": 3}})
    path = write(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=config)
    result = inspect(path, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    disputed = "alpha is 1 by tensor and 9 by lora_adapter_metadata; --alpha-conflict first takes"
    assert found["problems"] == ["unet.conv_in: has no up", f"{TO_Q}: {disputed} the first"] or (
        found["problems"] == [f"{TO_Q}: {disputed} the first", "unet.conv_in: has no up"]
    )
    assert [layer["name"] for layer in found["layers"]] == [TO_K, TO_Q]
    assert f"wrong: {TO_Q}: {disputed}" in inspect(path).stdout
    assert inspect(path, "--alpha-conflict", "first").exit_code == 1  # half a pair is left


def test_a_file_of_which_nothing_can_be_used_is_an_object_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {f"{TO_Q}.mystery": torch.ones(2)})
    result = inspect(path, "--json")
    assert result.exit_code == 1
    assert "1 of 1 keys cannot be used" in result.stderr
    found = json.loads(result.stdout)
    assert (found["keys"], found["used"], found["layers"]) == (1, 0, [])


def test_an_adapter_folder_is_a_lora(tmp_path: Path) -> None:
    write(
        tmp_path / "adapter_model.safetensors",
        peft_keys({f"base_model.model.{TO_Q}": random_pair(6, 4, 2)}),
    )
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 6, "peft_type": "LORA"}')
    (tmp_path / "README.md").write_text("---\ninstance_prompt: a photo of sks\n---\n")
    found = described(tmp_path)
    assert (found["trainer"], found["trigger_words"]) == ("PEFT", ["a photo of sks"])
    (layer,) = found["layers"]
    assert (layer["alpha"], layer["alpha_source"]) == (6.0, "adapter_config.json")


TRIGGERS: dict[str, tuple[dict[str, str], list[str]]] = {
    "modelspec": ({"modelspec.trigger_phrase": "a sks fox"}, ["a sks fox"]),
    "ai-toolkit": ({"ss_tag_frequency": '{"1_sks": {"sks": 1}}'}, ["sks"]),
    "tags of all pictures": (
        {
            "ss_tag_frequency": '{"a": {"sks": 8, "fox": 8, "snow": 2}, "b": {"ink": 5, "x": 4}}',
            "ss_dataset_dirs": '{"a": {"img_count": 8, "n_repeats": 1}, "b": {"img_count": 5}}',
        },
        ["sks", "fox", "ink"],
    ),
    "no tag is in all": (
        {
            "ss_tag_frequency": '{"a": {"sks": 3}}',
            "ss_dataset_dirs": '{"a": {"img_count": 8}}',
        },
        [],
    ),
    "a phrase goes first": (
        {"trigger_word": "x", "ss_tag_frequency": '{"1_sks": {"sks": 1}}'},
        ["x"],
    ),
    "no JSON": ({"ss_tag_frequency": "{"}, []),
    "no objects": ({"ss_tag_frequency": '{"a": 3, "b": {"c": "d", " ": 4}}'}, []),
    "too many": (
        {"ss_tag_frequency": json.dumps({"a": {f"t{i}": 1 for i in range(50)}})},
        [f"t{i}" for i in range(8)],
    ),
}


@pytest.mark.parametrize("case", TRIGGERS)
def test_trigger_words(case: str, tmp_path: Path) -> None:
    metadata, words = TRIGGERS[case]
    path = write(tmp_path / "a.safetensors", two_layers(), **metadata)
    assert described(path)["trigger_words"] == words


TRAINERS = {
    "ai-toolkit": {"software": '{"name": "ai-toolkit", "repo": "x"}'},
    "LyCORIS": {"ss_network_module": "lycoris.kohya"},
    "musubi-tuner": {"ss_network_module": "networks.lora_wan"},
    "sd-scripts": {"ss_sd_scripts_commit_hash": "0"},
    "OneTrainer": {"ot_config": "{}"},
    "PEFT": {"lora_adapter_metadata": "{}"},
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_trainers(trainer: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", two_layers(), **TRAINERS[trainer])
    assert described(path)["trainer"] == trainer


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("unet.down_blocks.1.attentions.0.proj_in", "unet.down_blocks.1"),
        ("unet.conv_in", "unet"),
        ("unet.mid_block.attentions.0.proj_in", "unet.mid_block.attentions.0"),
        (
            "transformer.single_transformer_blocks.12.attn.to_q.bias",
            "transformer.single_transformer_blocks.12",
        ),
        ("text_encoder.encoder.layers.3.mlp.fc1", "text_encoder.encoder.layers.3"),
    ],
)
def test_blocks(name: str, block: str) -> None:
    assert block_of(name) == block


@needs_real_loras
def test_a_real_file() -> None:
    found = described(real_lora("sd2_character.kohya"))
    assert (found["family"], found["layout"]) == ("sd2", "kohya")
    assert (found["keys"], found["used"], len(found["layers"])) == (660, 660, 220)
    assert found["license"] == "Apache-2.0"


def test_a_base_model_that_is_one_of_a_few_is_said_so(tmp_path: Path) -> None:
    """Anima's transformer has as many blocks as LTX-Video 2B, of one width and one name."""
    names = [f"transformer.transformer_blocks.{i}.attn1.to_q" for i in range(28)]
    tensors = {
        key: torch.ones(1, 2048) if ".lora_A." in key else torch.ones(2048, 1)
        for name in names
        for key in (f"{name}.lora_A.weight", f"{name}.lora_B.weight")
    }
    path = write(tmp_path / "a.safetensors", tensors)
    found = inspect(path).stdout.replace("\n", " ")
    assert "one of Anima, " in found
    assert "LTX-Video 2B" in found
    assert described(path)["family"] is None


@pytest.mark.parametrize("component", ["prior", "decoder", "transformer_2"])
def test_a_denoiser_of_no_record_is_read_under_its_own_paths(
    component: str, tmp_path: Path
) -> None:
    name = f"{component}.stages.0.1.attention.to_q"
    path = write(tmp_path / "a.safetensors", peft_keys({name: random_pair(8, 8, 2)}))
    (layer,) = described(path)["layers"]
    assert layer["name"] == name
