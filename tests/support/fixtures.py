"""LoRA files, pipelines and fusions that many tests share."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.applying import Apply
from support.copying import Copies
from support.generation import TWO_STEPS, LoraPair, build, generate
from support.hub import Hub, serving
from support.shipped import Shipped
from tiny_pipeline import Family, tiny_lora, tiny_pipeline

from klora_compile import compile_fusion
from klora_runtime import apply_fusion, save_fusion
from klora_runtime.artifact.fusion import Fusion

#: On models this small several threads are slower than one.
torch.set_num_threads(1)

#: Attention of all families, the text encoders, a 3x3 convolution, and what is a 1x1 in SD1.
_BOTH = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "v_proj", "conv1", "proj_in")


@pytest.fixture(scope="session")
def lora_pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, LoraPair]:
    """A content and a style LoRA per family: alphas, and layers that only one has."""
    folder = tmp_path_factory.mktemp("loras")
    return {family: _pair(folder, family) for family in ("sd1", "sd2", "sdxl")}


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    return Shipped.into(tmp_path_factory.mktemp("shipped"))


@pytest.fixture(scope="session")
def stated_artifact(shipped: Shipped, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two LoRAs that state trigger words and licences."""
    folder = tmp_path_factory.mktemp("stated")
    metadata = {
        "fox_v2": {"modelspec.trigger_phrase": "sks fox", "modelspec.license": "Fox Terms 1.1"},
        "ink": {"modelspec.trigger_phrase": "in ink_wash style"},
    }
    files = []
    for name, given in zip(("fox", "ink"), metadata, strict=True):
        tensors = load_file(shipped.artifact.with_name(f"{name}.safetensors"))
        files.append(folder / f"{given}.safetensors")
        save_file(tensors, files[-1], metadata=metadata[given])
    output = folder / "fox-in-ink.klora.safetensors"
    save_fusion(compile_fusion(*files, device="cpu"), output)
    return output


@pytest.fixture(scope="session")
def used_pipelines() -> Copies:
    """Of a pipeline that has sampled, which leaves attributes on pipelines and schedulers."""
    pipe = build(TWO_STEPS)
    generate(pipe, TWO_STEPS)
    return Copies(pipe)


@pytest.fixture
def pipe(used_pipelines: Copies) -> Any:
    return used_pipelines.make()


@pytest.fixture(params=["merge", "branch"])
def apply(request: pytest.FixtureRequest) -> Apply:
    """Tests that take it hold in every mode."""
    return functools.partial(apply_fusion, mode=request.param)


@pytest.fixture
def fusion(lora_pairs: dict[Family, LoraPair]) -> Fusion:
    return lora_pairs["sd1"].fusion(TWO_STEPS)


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """The messages that klora logs during the test."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("klora_compile", "klora_runtime")]
    for logger in loggers:
        logger.addHandler(handler)
    yield messages
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.fixture
def other_fusion(pipe: Any, tmp_path: Path) -> Fusion:
    """Of other layers: some the same, some only here."""
    files = [
        tiny_lora(pipe, tmp_path / f"{seed}.safetensors", seed=seed, modules=("to_q", "ff.net.2"))
        for seed in (5, 6)
    ]
    return compile_fusion(*files, device="cpu")


def _pair(folder: Path, family: Family) -> LoraPair:
    pipe = tiny_pipeline(family)
    files = {}
    for seed, (role, rank, own) in enumerate(
        [("content", 4, "conv2"), ("style", 3, "proj_out")], start=1
    ):
        path = folder / f"{family}-{role}.safetensors"
        tiny_lora(pipe, path, seed=seed, rank=rank, strength=1.0, modules=(*_BOTH, own))
        files[role] = _with_alphas(path, seed)
    return LoraPair(files["content"], files["style"])


def _with_alphas(path: Path, seed: int) -> Path:
    """Give half of the layers an alpha; the others scale by 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(str(path))
    for key in sorted(tensors):
        if key.endswith(".lora_A.weight") and torch.rand((), generator=generator) < 0.5:
            rank = tensors[key].shape[0]
            alpha = rank * (0.5 + torch.rand((), generator=generator))
            tensors[key.replace(".lora_A.weight", ".alpha")] = alpha
    save_file(tensors, str(path))
    return path


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where diffusers copies the Python files of models, instead of the user's cache."""
    folder = tmp_path / "modules"
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(folder))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub, with an empty cache and no token."""
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        # diffusers names no endpoint, and huggingface_hub reads the variable when it is imported.
        template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.address)
        yield hub
