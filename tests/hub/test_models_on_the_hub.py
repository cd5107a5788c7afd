"""Base models that are named on the Hub: whole pipelines by diffusers' download, and single files.

``--model`` and ``--base`` go the same way; the commit is recorded where the name is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from support.form_files import DORA_LAYER, small_dora
from support.hub import TOKEN, Hub, Repository
from support.shipped import Shipped, error_of, klora, pixels

from klora_compile import ReadOptions, compile_fusion, read_adapter, verify_fusion
from klora_compile.base_models import model_name
from klora_runtime import KloraError, load_fusion, save_fusion
from klora_runtime.errors import ConfigError


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path in it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def pipeline_of(base: Path) -> dict[str, bytes]:
    """A folder of a base model as a repository of a pipeline with one part."""
    files = {f"unet/diffusion_pytorch_{n.rpartition('/')[2]}": d for n, d in contents(base).items()}
    index = {"_class_name": "DiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    return {**files, "unet/config.json": b"{}", "model_index.json": json.dumps(index).encode()}


def sampled(model: str, output: Path, shipped: Shipped, *options: object) -> Any:
    words = ("sample", shipped.artifact, "--model", model, "--prompt", "a fox in ink")
    return klora(*words, "--steps", 2, "--device", "cpu", "-o", output, *options)


@pytest.fixture
def model(hub: Hub, shipped: Shipped) -> Repository:
    """A whole pipeline on the Hub."""
    return hub.add("me/model", {**contents(shipped.model), "README.md": b"", "picture.png": b"1"})


def test_sampling_downloads_a_whole_pipeline(
    model: Repository, hub: Hub, shipped: Shipped, tmp_path: Path
) -> None:
    commit = model.revisions["main"]
    here, there = tmp_path / "here.png", tmp_path / "there.png"
    assert sampled(str(shipped.model), here, shipped).exit_code == 0
    result = sampled("me/model", there, shipped, "--json")
    assert result.exit_code == 0, result.output
    assert pixels(there) == pixels(here)
    assert json.loads(result.stdout)["model"] == f"hf://me/model@{commit}"
    assert not any("picture.png" in request for request in hub.requests)


def test_a_revision_of_a_pipeline(
    model: Repository, hub: Hub, shipped: Shipped, tmp_path: Path
) -> None:
    first = model.revisions["main"]
    second = model.commit({**contents(shipped.model), "new.txt": b""})
    for name, commit in (("me/model", second), (f"me/model@{first}", first)):
        result = sampled(name, tmp_path / f"{commit}.png", shipped, "--json")
        assert json.loads(result.stdout)["model"] == f"hf://me/model@{commit}"
    assert error_of(sampled("me/model@v9", tmp_path / "x.png", shipped), 1).startswith(
        "me/model has no revision v9."
    )


def test_all_parts_come_from_one_commit(
    model: Repository, shipped: Shipped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The branch moves between the resolution and the download."""
    first = model.revisions["main"]
    download = DiffusionPipeline.download

    def moved_meanwhile(name: str, **named: Any) -> Any:
        model.commit({"model_index.json": b"{}"})
        return download(name, **named)

    monkeypatch.setattr(DiffusionPipeline, "download", moved_meanwhile)
    result = sampled("me/model", tmp_path / "fox.png", shipped, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"] == f"hf://me/model@{first}"


def test_a_pipeline_that_is_kept_serves_without_the_hub(
    model: Repository, hub: Hub, shipped: Shipped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sampled("me/model", tmp_path / "one.png", shipped).exit_code == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    count = len(hub.requests)
    result = sampled("me/model", tmp_path / "two.png", shipped)
    assert result.exit_code == 0, result.output
    assert len(hub.requests) == count


def test_what_is_no_pipeline_or_not_there(
    model: Repository, hub: Hub, shipped: Shipped, tmp_path: Path
) -> None:
    output = tmp_path / "fox.png"
    hub.add("me/fox", {"fox.safetensors": b""})
    assert "me/fox has no file model_index.json; found fox.safetensors" in (
        error_of(sampled("me/fox", output, shipped), 2)
    )
    assert error_of(sampled("me/none", output, shipped), 1).startswith(
        "there is no path me/none, and the Hub has no model of that name that you may see."
    )
    model.error = "GatedRepo"
    assert error_of(sampled("me/model", output, shipped), 1).startswith("me/model is gated.")


def test_a_broken_index_of_a_pipeline(hub: Hub, shipped: Shipped, tmp_path: Path) -> None:
    hub.add("me/model", {"model_index.json": b"{"})
    error = error_of(sampled("me/model", tmp_path / "fox.png", shipped), 1)
    assert "me/model" in error
    assert "Traceback" not in error


def test_the_commit_of_a_base_is_recorded(tmp_path: Path, hub: Hub) -> None:
    path, base = small_dora(tmp_path)
    repository = hub.add("me/base", pipeline_of(base))
    commit = repository.commit(pipeline_of(base), "v2")
    repository.commit({"model_index.json": b"{}"})
    options = ReadOptions(base="me/base@v2")
    adapter = read_adapter(path, options)
    expected = read_adapter(path, ReadOptions(base=base)).layers[DORA_LAYER].delta
    for mine, theirs in zip(
        adapter.layers[DORA_LAYER].delta.tensors, expected.tensors, strict=True
    ):
        assert torch.equal(mine, theirs)
    fusion = compile_fusion(adapter, adapter, device="cpu")
    assert fusion.sources["content"].notes["base"] == f"hf://me/base@{commit}"


def test_a_base_is_downloaded_only_if_a_weight_is_needed(hub: Hub, shipped: Shipped) -> None:
    plain = shipped.artifact.with_name("fox.safetensors")
    hub.add("me/base", {"model_index.json": b"{}"})
    adapter = read_adapter(plain, ReadOptions(base="me/base"))
    assert hub.requests == []
    assert adapter.base is None


def test_a_base_is_resolved_once_for_all_loras(tmp_path: Path, hub: Hub) -> None:
    path, base = small_dora(tmp_path)
    hub.add("me/base", pipeline_of(base))
    options = ReadOptions(base="me/base")
    read_adapter(path, options)  # now everything is in the cache
    count = len(hub.requests)
    read_adapter(path, options)
    once = hub.requests[count:]
    assert once
    count = len(hub.requests)
    fusion = compile_fusion(path, [path, path], options=options, device="cpu")
    assert hub.requests[count:] == once
    assert len({source.notes["base"] for source in fusion.sources.values()}) == 1
    count = len(hub.requests)
    loras = dict.fromkeys(fusion.sources, path)
    assert verify_fusion(fusion, loras, base="me/base", device="cpu") == []
    assert hub.requests[count:] == once


def test_equal_files_may_lie_anywhere(tmp_path: Path, hub: Hub) -> None:
    """A recipient has the LoRAs and the base model elsewhere."""
    path, base = small_dora(tmp_path)
    hub.add("me/base", pipeline_of(base))
    hub.add("me/fox", {path.name: path.read_bytes()})
    options = ReadOptions(base="me/base")
    fusion = compile_fusion("me/fox", "me/fox", options=options, device="cpu")
    artifact = tmp_path / "fused.klora.safetensors"
    save_fusion(fusion, artifact)
    loras = {"content": path, "style": path}
    assert verify_fusion(load_fusion(artifact), loras, base=base, device="cpu") == []


def test_a_base_in_one_file_has_its_commit(tmp_path: Path, hub: Hub) -> None:
    from klora_compile.base_models import model_path

    commit = hub.add("me/base", {"base.safetensors": b""}).revisions["main"]
    path = model_path("me/base/base.safetensors")
    assert model_name(path) == f"hf://me/base@{commit}/base.safetensors"
    assert model_name(tmp_path / "here") == "here"


@pytest.mark.parametrize("command", ["compile", "inspect", "sample", "pull", "push", "verify"])
@pytest.mark.parametrize("answer", ["GatedRepo", "ServerBroken"])
def test_a_token_is_never_printed(
    command: str, answer: str, hub: Hub, shipped: Shipped, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Neither that of the environment, nor one that somebody wrote into the Hub's address."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    scheme, _, host = hub.address.partition("://")
    monkeypatch.setenv("HF_ENDPOINT", f"{scheme}://me:{TOKEN}@{host}")
    hub.add("me/it", {"it.safetensors": b""}).error = answer
    words = {
        "compile": ("me/it", "me/it", "-o", tmp_path / "x.klora.safetensors"),
        "inspect": ("me/it",),
        "sample": ("me/it", "--model", "me/it", "--prompt", "a", "-o", tmp_path / "a.png"),
        "pull": ("me/it", "-o", tmp_path / "x.klora.safetensors"),
        "push": (shipped.artifact, "me/it"),
        "verify": ("me/it",),
    }
    result = klora(command, *words[command])
    assert result.exit_code != 0
    assert "me/it" in result.output
    assert TOKEN not in result.output


def test_a_token_in_a_name_is_refused_and_not_repeated(hub: Hub, shipped: Shipped) -> None:
    host = hub.address.partition("://")[2]
    for name in (f"http://{TOKEN}@{host}/me/it", f"{hub.address}/me/it?token={TOKEN}"):
        result = klora("inspect", name)
        assert result.exit_code == 2
        assert "holds a user or a token" in result.output
        assert TOKEN not in result.output


def test_an_address_that_is_none() -> None:
    from klora_runtime.hub.address import address_of

    with pytest.raises(ConfigError, match="names no model on the Hub"):
        address_of("https://[huggingface.co/me/it")


@pytest.mark.parametrize("suffix", ["bin", "pt", "ckpt"])
def test_a_pickle_from_the_hub_loads_as_weights_only(
    suffix: str, hub: Hub, shipped: Shipped, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    plain = shipped.artifact.with_name("fox.safetensors")
    torch.save(load_file(plain), tmp_path / "good")
    torch.save(Runs(tmp_path / "ran"), tmp_path / "bad")
    hub.add("me/good", {f"fox.{suffix}": (tmp_path / "good").read_bytes()})
    hub.add("me/bad", {f"fox.{suffix}": (tmp_path / "bad").read_bytes()})
    found, expected = read_adapter("me/good"), read_adapter(plain)
    assert found.layers.keys() == expected.layers.keys()
    with pytest.raises(KloraError, match="is not only tensors"):
        read_adapter("me/bad")
    assert not (tmp_path / "ran").exists()


class Runs:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)
