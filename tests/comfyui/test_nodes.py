"""The nodes as ComfyUI calls them, their files, and the example workflow."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from support.comfyui.kits import PACK, pack
from support.comfyui.literal import (
    error,
    flux_fusion,
    literally,
    of_one_model,
    storable,
    wan_fusion,
)
from support.handmade import hand_entry, hand_fusion

from klora_runtime import save_fusion
from klora_runtime.errors import ArtifactError, ConfigError, IncompatibleModelError

NAMES = ("KloraLoadFusion", "KloraApplyFusion", "KloraFusionInfo")


@pytest.fixture
def nodes(kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The nodes by name, loaded as ComfyUI does, with one artifact in the folder of models."""
    folders = sys.modules["folder_paths"]
    monkeypatch.setattr(folders, "models_dir", str(tmp_path))
    monkeypatch.setattr(folders, "folder_names_and_paths", {})
    (tmp_path / "klora").mkdir()
    save_fusion(storable(flux_fusion()), tmp_path / "klora" / "fox.klora.safetensors")
    extension = asyncio.run(pack().comfy_entrypoint())
    listed = asyncio.run(extension.get_node_list())
    return {node.GET_SCHEMA().node_id: node for node in listed}


def run(node: Any, **inputs: Any) -> tuple[Any, ...]:
    result: tuple[Any, ...] = node.execute(**inputs).result
    return result


def test_a_graph_of_all_nodes_runs(kit: Any, nodes: dict[str, Any]) -> None:
    load, apply, info = (nodes[name] for name in NAMES)
    (fusion,) = run(load, artifact="fox.klora.safetensors")
    patcher = kit.patcher(kit.flux())
    bare = kit.sample(patcher)
    (model, clip) = run(apply, model=patcher, fusion=fusion, style=0.5)
    assert clip is None
    assert not torch.equal(kit.sample(model), bare)
    assert torch.equal(kit.sample(patcher), bare)
    (off, _) = run(apply, model=patcher, fusion=fusion, enabled=False)
    assert off is patcher
    picture, text = run(info, fusion=fusion)
    assert picture.shape[0] == 1
    assert picture.shape[3] == 3
    assert 0.0 <= float(picture.min()) < float(picture.max()) <= 1.0
    assert "slot content: content" in text
    assert "models: transformer; clock: step" in text


def test_two_models_in_turn_have_one_schedule(kit: Any, nodes: dict[str, Any]) -> None:
    """Wan 2.2: two nodes over one total of steps; the second model goes on from the first."""
    fusion, parts = wan_fusion(), (slice(0, 4), slice(3, None))
    models, literals = [kit.patcher(kit.wan()) for _ in range(2)], []
    latent = expected = swapped = None
    for part, model, name, start in zip(
        parts, models, ("transformer", "transformer_2"), (0, 3), strict=True
    ):
        settings = {"fusion": fusion, "steps": 6, "start_at_step": start}
        applied = run(nodes["KloraApplyFusion"], model=model, denoiser=name, **settings)[0]
        latent = kit.sample(applied, steps=6, part=part, latent=latent)
        progress = [(step + 0.5) / 6 for step in range(start, start + 3)]
        own = of_one_model(fusion, name)
        places = kit.places("wan", model.model)
        expected = literally(
            kit, model, [(own, {})], places, progress, steps=6, part=part, latent=expected
        )
        literals.append(error(latent, expected))
        other = "transformer" if name == "transformer_2" else "transformer_2"
        wrong = run(nodes["KloraApplyFusion"], model=model, denoiser=other, **settings)[0]
        swapped = kit.sample(wrong, steps=6, part=part, latent=swapped)
    assert max(literals) < 1e-5
    assert latent is not None
    assert swapped is not None
    assert error(swapped, latent) > 1e-2


def test_the_map_shows_who_acts_when(nodes: dict[str, Any]) -> None:
    from klora_runtime.artifact.palette import CONTENT_RGB, STYLE_RGB

    fusion = hand_fusion(hand_entry("transformer.x_embedder", (4, 4), switch=0.25), family="flux.1")
    picture, _ = run(nodes["KloraFusionInfo"], fusion=fusion)
    row = [tuple(round(float(c) * 255) for c in pixel) for pixel in picture[0, 12 + 32 + 4]]
    content, style = row.count(CONTENT_RGB), row.count(STYLE_RGB)
    assert (content, style) == (180, 540)
    assert row.index(CONTENT_RGB) < row.index(STYLE_RGB)


def test_schemas_say_what_a_user_may_set(nodes: dict[str, Any]) -> None:
    load, apply, _ = (nodes[name].GET_SCHEMA() for name in NAMES)
    assert load.inputs[0].options == ["fox.klora.safetensors"]
    known = {each.id: each for each in apply.inputs}
    assert list(known)[:3] == ["model", "fusion", "clip"]
    assert known["clip"].optional
    assert (known["steps"].default, known["start_at_step"].default) == (0, 0)
    assert known["denoiser"].options[:3] == ["auto", "transformer", "transformer_2"]
    assert {schema.category for schema in (load, apply)} == {"klora"}


def test_the_folder_of_users_stays_beside_comfyuis(
    kit: Any, nodes: dict[str, Any], tmp_path: Path
) -> None:
    folders = sys.modules["folder_paths"]
    mine = tmp_path / "elsewhere"
    mine.mkdir()
    folders.folder_names_and_paths["klora"] = ([str(mine)], set())  # type: ignore[attr-defined]
    settings = pack("settings")
    settings.register_folder()
    settings.register_folder()
    paths, endings = folders.folder_names_and_paths["klora"]  # type: ignore[attr-defined]
    assert paths == [str(mine), str(tmp_path / "klora")]
    assert endings == {".safetensors"}
    save_fusion(storable(flux_fusion()), mine / "other.klora.safetensors")
    assert settings.artifact_path("other.klora.safetensors").parent == mine


def test_a_replaced_file_is_read_again(nodes: dict[str, Any], tmp_path: Path) -> None:
    load, name = nodes["KloraLoadFusion"], "fox.klora.safetensors"
    before = load.fingerprint_inputs(artifact=name)
    assert load.fingerprint_inputs(artifact=name) == before
    save_fusion(storable(flux_fusion(seed=3)), tmp_path / "klora" / name, overwrite=True)
    assert load.fingerprint_inputs(artifact=name) != before


def test_files_that_are_no_artifacts_are_refused(nodes: dict[str, Any], tmp_path: Path) -> None:
    load = nodes["KloraLoadFusion"]
    with pytest.raises(ArtifactError, match=r"there is no artifact lost\.safetensors in ComfyUI"):
        run(load, artifact="lost.safetensors")
    (tmp_path / "klora" / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(ArtifactError):
        run(load, artifact="bad.safetensors")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"weights": "lightning"}, "weights: expected SLOT=NUMBER, found lightning"),
        ({"weights": "lightning=1"}, "there is no slot lightning; this fusion has content, style"),
        ({"weights": "style=1"}, "weights: set style in its own field"),
        ({"weights": "a=1 a=2"}, "weights: a is stated twice"),
        ({"weights": "a=x"}, "weights: a needs a number, found x"),
        ({"content": 1000.0}, "weight of content: expected a number from -100 to 100"),
        ({"content": float("nan")}, "weight of content: expected a number from -100 to 100"),
        ({"start_at_step": 3}, "start_at_step=3 without steps"),
        ({"steps": 3, "start_at_step": 3}, "start_at_step=3: expected less than steps=3"),
        ({"denoiser": "transformer_2"}, "denoiser=transformer_2: the artifact has transformer"),
    ],
)
def test_bad_inputs_have_one_clear_error(
    kit: Any, nodes: dict[str, Any], inputs: dict[str, Any], message: str
) -> None:
    patcher = kit.patcher(kit.flux())
    with pytest.raises(ConfigError) as e:
        run(nodes["KloraApplyFusion"], model=patcher, fusion=flux_fusion(), **inputs)
    assert message in str(e.value)


def test_a_slot_that_a_fusion_lacks_may_stay_at_one(kit: Any, nodes: dict[str, Any]) -> None:
    settings = pack("settings")
    only = hand_fusion(hand_entry("transformer.x_embedder", (4, 4), switch=None))
    assert settings.weights_of(only, 0.5, 1.0, "") == {"content": 0.5, "style": 1.0}
    lacks = type(only)(**{**vars(only), "slots": {"content": only.slots["content"]}})
    assert settings.weights_of(lacks, 1.0, 1.0, "") == {"content": 1.0}
    with pytest.raises(ConfigError, match="there is no slot style"):
        settings.weights_of(lacks, 1.0, 0.5, "")


def test_text_encoders_without_a_clip_are_warned_of(
    kit: Any, nodes: dict[str, Any], logs: list[str]
) -> None:
    fusion = hand_fusion(
        *flux_fusion().entries,
        hand_entry("text_encoder.encoder.layers.0.mlp.fc1", (4, 4), switch=None),
        family="flux.1",
    )
    run(nodes["KloraApplyFusion"], model=kit.patcher(kit.flux()), fusion=fusion)
    assert "also changes 1 layers of text encoders. Connect clip" in "".join(logs)


def test_a_fusion_for_another_model_is_refused_by_the_node(kit: Any, nodes: dict[str, Any]) -> None:
    with pytest.raises(IncompatibleModelError, match="are not in this"):
        run(nodes["KloraApplyFusion"], model=kit.patcher(kit.sd1()), fusion=flux_fusion())


def test_the_pack_states_what_the_registry_asks_for() -> None:
    stated = tomllib.loads((PACK / "pyproject.toml").read_text())
    project, comfy = stated["project"], stated["tool"]["comfy"]
    assert project["dependencies"] == ["klora-runtime"]
    assert {"PublisherId", "DisplayName"} <= comfy.keys()
    assert "comfyui" not in project["name"].lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    if not comfy["PublisherId"]:
        assert "write its id into `PublisherId`" in (PACK / "README.md").read_text()
    assert (PACK / "requirements.txt").read_text().split() == ["klora-runtime"]


@pytest.mark.parametrize(
    "path", sorted((PACK / "example_workflows").glob("*.json")), ids=lambda path: path.stem
)
def test_example_workflows_use_the_nodes_as_they_are(path: Path, nodes: dict[str, Any]) -> None:
    """Every link joins an output and an input of one type; every value of a widget has a place."""
    graph = json.loads(path.read_text())
    by_id = {node["id"]: node for node in graph["nodes"]}
    for number, source, out, target, place, kind in graph["links"]:
        given, taken = by_id[source]["outputs"][out], by_id[target]["inputs"][place]
        assert given["type"] == taken["type"] == kind
        assert number in given["links"]
        assert taken["link"] == number
    own = [node for node in graph["nodes"] if node["type"] in NAMES]
    assert {node["type"] for node in own} == set(NAMES)
    for node in own:
        schema = nodes[node["type"]].GET_SCHEMA()
        wires = ("MODEL", "CLIP", "KLORA_FUSION")
        widgets = [each for each in schema.inputs if io_type_of(each) not in wires]
        assert len(node["widgets_values"]) == len(widgets)
        sockets = [each.id for each in schema.inputs if io_type_of(each) in wires]
        assert [each["name"] for each in node["inputs"]] == sockets
        assert [each["name"] for each in node["outputs"]] == [
            each.display_name for each in schema.outputs
        ]


def io_type_of(each: Any) -> str:
    found = each.io_type
    return str(found)
