"""LoRAs and artifacts that are named on the Hub, in Python and on the command line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from support.form_files import DORA_LAYER, small_dora
from support.hub import Hub
from support.shipped import Shipped, pixels
from tiny_pipeline import tiny_pipeline

from klora_compile import ReadOptions, compile_fusion, read_adapter, thin
from klora_compile.cli import main
from klora_runtime import (
    ArtifactError,
    ConfigError,
    Fusion,
    FusionLibrary,
    apply_fusion,
    load_fusion,
    save_fusion,
)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments])


def done(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def schedule(fusion: Fusion) -> list[tuple[str, Any, Any]]:
    return [(each.module, each.timeline, each.scores) for each in fusion.entries]


@pytest.fixture
def loras(shipped: Shipped, hub: Hub) -> dict[str, bytes]:
    """A subject and a style, each alone in a repository, and both in a third one."""
    files = {
        name: shipped.artifact.with_name(f"{name}.safetensors").read_bytes()
        for name in ("fox", "ink")
    }
    for name, data in files.items():
        hub.add(f"me/{name}", {f"{name}.safetensors": data, "README.md": b""})
    hub.add("me/both", {f"{name}.safetensors": data for name, data in files.items()})
    return files


def test_a_fusion_of_names_states_their_commits(
    shipped: Shipped, hub: Hub, loras: dict[str, bytes]
) -> None:
    named = compile_fusion("me/fox", "hf://me/ink@main/ink.safetensors", device="cpu")
    of_files = load_fusion(shipped.artifact)
    assert schedule(named) == schedule(of_files)
    for slot, name in (("content", "fox"), ("style", "ink")):
        commit = hub.repositories[f"me/{name}"].revisions["main"]
        stated = {"repo": f"me/{name}", "file": f"{name}.safetensors", "commit": commit}
        assert named.sources[slot].notes["hub"] == stated
        assert named.sources[slot].file == of_files.sources[slot].file
        assert "hub" not in of_files.sources[slot].notes


def test_weight_names(loras: dict[str, bytes]) -> None:
    names = {"content": "fox.safetensors", "style": "ink.safetensors"}
    found = compile_fusion("me/both", "me/both", device="cpu", weight_names=names)
    digests = {slot: source.sha256 for slot, source in found.sources.items()}
    wanted = {
        slot: hashlib.sha256(loras[name.removesuffix(".safetensors")]).hexdigest()
        for slot, name in names.items()
    }
    assert digests == wanted
    assert read_adapter("me/both", weight_name="ink.safetensors").sha256 == wanted["style"]
    with pytest.raises(ConfigError, match="me/both has 2 files that may be the LoRA"):
        compile_fusion("me/both", "me/fox", device="cpu")
    with pytest.raises(ConfigError, match="weight_names: there is no LoRA stile; expected content"):
        compile_fusion("me/both", "me/fox", device="cpu", weight_names={"stile": "a"})


def test_the_command_line(tmp_path: Path, hub: Hub, loras: dict[str, bytes]) -> None:
    output = tmp_path / "fused.klora.safetensors"
    made = ("compile", "me/both", "me/ink", "--device", "cpu", "-o", output)
    done(*made, "--weight-name", "content=fox.safetensors")
    fusion = load_fusion(output)
    assert fusion.sources["content"].notes["hub"]["file"] == "fox.safetensors"
    hub.add("me/fused", {"fused.klora.safetensors": output.read_bytes()})
    assert done("inspect", "me/fused")["sources"].keys() == {"content", "style"}
    against = ("--against", "me/both/fox.safetensors", "me/ink")
    assert done("verify", "me/fused", *against, "--device", "cpu")["good"]
    plain = tmp_path / "plain.klora.safetensors"
    done("recompile", "me/fused", "--rule", "direct", "-o", plain)
    assert load_fusion(plain).rule.name == "direct"
    assert done("inspect", "me/both", "--weight-name", "ink.safetensors")["layers"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--weight-name", "a=fox.safetensors"), "there is no LoRA a; expected content, style."),
        (
            ("--weight-name", "fox.safetensors"),
            "2 LoRAs are named as a repository alone; say which, such as --weight-name "
            "content=fox.safetensors.",
        ),
        (
            ("--weight-name", "content=a", "--weight-name", "content=b"),
            "names two files for content",
        ),
        (("--weight-name", "=a"), "'=a' is not [SLOT=]FILE."),
    ],
)
def test_wrong_weight_names(
    tmp_path: Path, hub: Hub, loras: dict[str, bytes], arguments: tuple[str, ...], sentence: str
) -> None:
    result = run("compile", "me/both", "me/both", *arguments, "-o", tmp_path / "x.safetensors")
    assert result.exit_code == 2
    assert sentence in " ".join(result.output.split())


def test_a_thin_artifact_takes_names(
    tmp_path: Path, shipped: Shipped, loras: dict[str, bytes], hub: Hub
) -> None:
    adapters = {"content": read_adapter("me/fox"), "style": read_adapter("me/ink")}
    full = compile_fusion(*adapters.values(), device="cpu")
    path = tmp_path / "thin.klora.safetensors"
    save_fusion(thin(full, adapters), path)
    filled = load_fusion(path, sources={"content": "me/fox", "style": "me/both/ink.safetensors"})
    save_fusion(filled, tmp_path / "filled.klora.safetensors")
    save_fusion(full, tmp_path / "full.klora.safetensors")
    written = [tmp_path / f"{name}.klora.safetensors" for name in ("filled", "full")]
    assert written[0].read_bytes() == written[1].read_bytes()
    with pytest.raises(ArtifactError) as error:
        apply_fusion(tiny_pipeline("sd1"), path)
    commit = hub.repositories["me/fox"].revisions["main"]
    assert f", hf://me/fox@{commit}/fox.safetensors" in str(error.value)


def test_a_base_in_one_file(tmp_path: Path, hub: Hub) -> None:
    path, base = small_dora(tmp_path)
    (weight,) = load_file(base / "unet" / "model.safetensors").values()
    single = tmp_path / "single.safetensors"
    block = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0"
    save_file({f"{block}.attn1.to_q.weight": weight}, str(single))
    hub.add("me/base", {"single.safetensors": single.read_bytes()})
    named = read_adapter(path, ReadOptions(base="me/base/single.safetensors"))
    expected = read_adapter(path, ReadOptions(base=base)).layers[DORA_LAYER].delta
    for mine, theirs in zip(named.layers[DORA_LAYER].delta.tensors, expected.tensors, strict=True):
        assert torch.equal(mine, theirs)


def test_nothing_is_downloaded_for_an_output_that_exists(
    tmp_path: Path, hub: Hub, loras: dict[str, bytes]
) -> None:
    hub.add("me/fused", {"a.klora.safetensors": b""})
    output = tmp_path / "there.klora.safetensors"
    output.touch()
    for arguments in (("compile", "me/fox", "me/ink"), ("pull", "me/fused")):
        result = run(*arguments, "-o", output)
        assert result.exit_code == 1
        assert "exists" in result.output
    assert hub.requests == []


def test_a_pipeline_takes_the_name_of_an_artifact(shipped: Shipped, hub: Hub) -> None:
    data = shipped.artifact.read_bytes()
    hub.add("me/fused", {"a.klora.safetensors": data, "b.klora.safetensors": data})
    pipe = tiny_pipeline("sd1")
    with pytest.raises(ConfigError, match="me/fused has 2 files that may be the artifact"):
        apply_fusion(pipe, "me/fused")
    with apply_fusion(pipe, "me/fused", weight_name="a.klora.safetensors") as handle:
        handle.swap("me/fused/b.klora.safetensors")
        assert schedule(handle.fusion) == schedule(load_fusion(shipped.artifact))
        with pytest.raises(ConfigError, match="weight_name='a' is for a name on the Hub"):
            handle.swap(handle.fusion, weight_name="a")


def test_a_library_asks_the_hub_once(shipped: Shipped, hub: Hub) -> None:
    repository = hub.add("me/fused", {"a.klora.safetensors": shipped.artifact.read_bytes()})
    library = FusionLibrary(10**9)
    fusion = library.get("me/fused")
    assert "me/fused" in library
    count = len(hub.requests)
    repository.commit({"a.klora.safetensors": b"newer"})
    assert library.get("me/fused") is fusion
    assert len(hub.requests) == count
    library.clear()
    with pytest.raises(ArtifactError):
        library.get("me/fused")


def test_pull(tmp_path: Path, shipped: Shipped, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = shipped.artifact.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    commit = hub.add("me/fused", {"a.klora.safetensors": data}).revisions["main"]
    facts = done("pull", "me/fused", "--sha256", digest.upper())
    assert facts["hub"] == {"repo": "me/fused", "file": "a.klora.safetensors", "commit": commit}
    assert facts["sha256"] == digest
    assert Path(facts["output"]).read_bytes() == data
    assert "exists" in run("pull", "me/fused").output
    result = run("pull", "me/fused", "--force", "--sha256", "0" * 64)
    assert result.exit_code == 1
    assert f"expected the SHA-256 {'0' * 64}, found {digest}" in result.output
    assert (tmp_path / "a.klora.safetensors").read_bytes() == data
    assert "is not a name on the Hub; write" in run("pull", "a.klora.safetensors").output


def test_pull_refuses_damage(tmp_path: Path, shipped: Shipped, hub: Hub) -> None:
    data = bytearray(shipped.artifact.read_bytes())
    data[-1] ^= 1
    hub.add("me/fused", {"a.klora.safetensors": bytes(data)})
    output = tmp_path / "a.klora.safetensors"
    result = run("pull", "me/fused", "-o", output)
    assert result.exit_code == 1
    assert "1 of" in result.output
    assert not output.exists()


def test_sampling_takes_names_and_diffusers_options(
    tmp_path: Path, shipped: Shipped, hub: Hub
) -> None:
    hub.add("me/fused", {"a.klora.safetensors": shipped.artifact.read_bytes()})
    pictures = []
    for name, steps, scale in (
        ("me/fused", "--num-inference-steps", "--guidance-scale"),
        (shipped.artifact, "--steps", "--guidance"),
    ):
        pictures.append(tmp_path / f"{len(pictures)}.png")
        done(
            *("sample", name, "--model", shipped.model, "--prompt", "a fox"),
            *(steps, 2, scale, 3, "--device", "cpu", "-o", pictures[-1]),
        )
    assert pixels(pictures[0]) == pixels(pictures[1])
