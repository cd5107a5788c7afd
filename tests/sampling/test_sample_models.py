"""``klora sample`` and the model: folders that cannot be loaded, schedulers, dtypes, compiling."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from support.shipped import Shipped, error_of, sampled
from tiny_pipeline import tiny_lora, tiny_pipeline

from klora_compile import compile_fusion
from klora_compile.sampling import pipeline
from klora_runtime import KloraError, load_fusion, save_fusion
from klora_runtime.errors import ConfigError


@pytest.fixture
def broken(shipped: Shipped, tmp_path: Path) -> Path:
    """A copy of the model, to be damaged."""
    return Path(shutil.copytree(shipped.model, tmp_path / "model"))


def test_a_missing_model(shipped: Shipped, tmp_path: Path) -> None:
    output = tmp_path / "fox.png"
    assert error_of(sampled(shipped, output, model="/nowhere/model"), 1) == (
        "there is no folder /nowhere/model; expected a diffusers folder, or OWNER/NAME of a model "
        "on the Hub."
    )


def test_a_folder_that_is_none_of_diffusers(shipped: Shipped, tmp_path: Path) -> None:
    folder, output = tmp_path / "model", tmp_path / "fox.png"
    folder.mkdir()
    said = f"{folder} is not a diffusers folder: expected model_index.json in it, found "
    advice = ". Name the folder that pipe.save_pretrained(FOLDER) wrote."
    assert error_of(sampled(shipped, output, model=folder), 1) == f"{said}nothing{advice}"
    for name in ("v1-5.ckpt", "config.yaml"):
        (folder / name).touch()
    error = error_of(sampled(shipped, output, model=folder), 1)
    assert error == f"{said}config.yaml, v1-5.ckpt{advice}"


def test_a_checkpoint_file_is_no_model(shipped: Shipped, tmp_path: Path) -> None:
    checkpoint = tmp_path / "v1-5.safetensors"
    checkpoint.touch()
    assert error_of(sampled(shipped, tmp_path / "fox.png", model=checkpoint), 1) == (
        f"{checkpoint} is a file, expected a diffusers folder. Make one of a checkpoint: "
        "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
    )


def test_a_broken_index(shipped: Shipped, broken: Path, tmp_path: Path) -> None:
    (broken / "model_index.json").write_text("{]")
    error = error_of(sampled(shipped, tmp_path / "fox.png", model=broken), 1)
    assert error.startswith(f"model_index.json of {broken} cannot be read: Expecting property name")
    assert error.endswith(". Get the folder again.")


def test_parts_of_a_library_that_is_not_installed(
    shipped: Shipped, broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert error_of(sampled(shipped, tmp_path / "fox.png", model=broken), 1) == (
        f"parts of {broken} come from transformers, which is not installed. Run this in klora's "
        "source folder: pip install ./runtime '.[plot,sample]', or install it alone: pip install "
        "transformers\n"
        "  - text_encoder is a transformers.CLIPTextModel\n"
        "  - tokenizer is a transformers.CLIPTokenizer"
    )


def test_a_model_without_its_weights(shipped: Shipped, broken: Path, tmp_path: Path) -> None:
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    error = error_of(sampled(shipped, tmp_path / "fox.png", model=broken), 1)
    assert error.startswith(f"diffusers cannot load {broken}: ")
    assert f"found in directory {broken}/unet." in error
    assert error.endswith(
        " Get the folder again, or save it again with pipe.save_pretrained(FOLDER)."
    )


def test_a_class_that_diffusers_does_not_have(
    shipped: Shipped, broken: Path, tmp_path: Path
) -> None:
    index = broken / "model_index.json"
    document = json.loads(index.read_text()) | {"_class_name": "PerpetualPipeline"}
    index.write_text(json.dumps(document))
    error = error_of(sampled(shipped, tmp_path / "fox.png", model=broken), 1)
    assert error.startswith("the model is for PerpetualPipeline, which diffusers ")
    assert error.endswith(" Update diffusers, or get that file too.")


def test_a_fusion_of_another_model(shipped: Shipped, tmp_path: Path) -> None:
    other = tiny_pipeline("sd2")
    other.save_pretrained(tmp_path / "sd2")
    result = sampled(shipped, tmp_path / "fox.png", model=tmp_path / "sd2")
    assert result.exit_code == 0  # the layers of the two tiny models have the same shapes
    wide = [
        tiny_lora(other, tmp_path / f"{seed}.safetensors", seed=seed, modules=("proj_in",))
        for seed in (1, 2)
    ]
    misfit = Shipped(tmp_path / "wide.klora.safetensors", shipped.model)
    fusion = compile_fusion(*wide, device="cpu")
    for entry in fusion.entries:
        object.__setattr__(entry, "module", entry.module.replace("proj_in", "proj_inn"))
    save_fusion(fusion, misfit.artifact)
    error = error_of(sampled(misfit, tmp_path / "fox.png", "--force"), 1)
    assert error.splitlines()[:2] == [
        f"{misfit.artifact} cannot be applied to {misfit.model}: no layer of the fusion fits "
        "UNet2DConditionModel; nothing was changed.",
        "  - unet.down_blocks.0.attentions.0.proj_inn: there is no such module",
    ]


@pytest.mark.parametrize("name", ["DDIM", "ddimscheduler", "DDIMScheduler"])
def test_schedulers_by_name(name: str) -> None:
    pipe = tiny_pipeline("sd1")
    before = pipe.scheduler.config
    pipeline.use_scheduler(pipe, name)
    assert type(pipe.scheduler) is DDIMScheduler
    assert pipe.scheduler.config.beta_start == before.beta_start
    assert pipe.scheduler.config.beta_start != DDIMScheduler().config.beta_start


def test_a_scheduler_that_does_not_fit_is_wrong_usage(shipped: Shipped, tmp_path: Path) -> None:
    output = tmp_path / "fox.png"
    error = error_of(sampled(shipped, output, "--scheduler", "FlowMatchEulerDiscrete"), 2)
    assert error.startswith(
        "--scheduler FlowMatchEulerDiscrete: not one that fits this model, which comes with PNDM. "
        "These fit: DDIM, "
    )
    listed = error.partition("These fit: ")[2].rstrip(".").split(", ")
    assert {"DDIM", "EulerDiscrete", "PNDM"} <= set(listed)
    assert listed == sorted(listed)
    assert not output.exists()


def test_flow_matching_models_keep_to_their_own_scheduler() -> None:
    pipe = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    with pytest.raises(ConfigError, match=r"These fit: FlowMatchEulerDiscrete\.$"):
        pipeline.use_scheduler(pipe, "ddim")


def test_a_scheduler_that_cannot_say_what_fits_takes_any_of_diffusers() -> None:
    pipe = SimpleNamespace(scheduler=SimpleNamespace(config={"beta_start": 0.001}))
    pipeline.use_scheduler(pipe, "DDIM")
    assert type(pipe.scheduler) is DDIMScheduler
    with pytest.raises(ConfigError, match="SimpleNamespace has no scheduler to replace"):
        pipeline.use_scheduler(SimpleNamespace(), "DDIM")


def test_a_scheduler_whose_library_is_missing_names_it() -> None:
    class NeedsMore:
        def __init__(self, **settings: Any) -> None:
            raise ImportError("NeedsMoreScheduler requires the torchsde library.")

        from_config = classmethod(lambda cls, config: cls(**config))

    scheduler = SimpleNamespace(config={}, compatibles=[NeedsMore])
    with pytest.raises(KloraError) as caught:
        pipeline.use_scheduler(SimpleNamespace(scheduler=scheduler), "needsmore")
    assert str(caught.value) == (
        "--scheduler needsmore needs a library that is not installed: NeedsMoreScheduler requires "
        "the torchsde library."
    )


@pytest.mark.parametrize(
    ("dtype", "variant"), [(torch.float16, "fp16"), (torch.bfloat16, None), (torch.float32, None)]
)
def test_auto_dtype_is_the_stored_one_on_a_gpu(
    shipped: Shipped, tmp_path: Path, dtype: torch.dtype, variant: str | None
) -> None:
    tiny_pipeline("sd1").unet.to(dtype).save_pretrained(tmp_path / "unet", variant=variant)
    fusion = load_fusion(shipped.artifact)
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    assert pipeline._dtype(tmp_path, fusion.components, gpu, "auto") is dtype
    assert pipeline._dtype(tmp_path, fusion.components, cpu, "auto") is torch.float32
    assert pipeline._dtype(tmp_path, fusion.components, gpu, "float32") is torch.float32
    assert pipeline._variant(tmp_path) == variant


def test_a_folder_of_one_variant_is_loaded_in_the_dtype_that_was_asked(
    shipped: Shipped, tmp_path: Path
) -> None:
    tiny_pipeline("sd1").to(torch.float16).save_pretrained(tmp_path / "fp16", variant="fp16")
    fusion = load_fusion(shipped.artifact)
    for name, dtype in {"auto": torch.float32, "bfloat16": torch.bfloat16}.items():
        pipe = pipeline.load_pipeline(
            str(tmp_path / "fp16"), fusion.components, device="cpu", dtype=name
        )
        assert {pipe.unet.dtype, pipe.text_encoder.dtype, pipe.vae.dtype} == {dtype}


def test_a_model_too_large_for_the_device(
    shipped: Shipped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def to(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DiffusionPipeline, "to", to)
    assert error_of(sampled(shipped, tmp_path / "fox.png"), 1) == (
        f"{shipped.model} cannot be moved to cpu: CUDA out of memory. Try --dtype bfloat16, "
        "another --device, or a smaller model."
    )


def test_compile_compiles_the_repeated_blocks(
    shipped: Shipped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    where = "diffusers.models.modeling_utils.ModelMixin.compile_repeated_blocks"
    monkeypatch.setattr(where, lambda model: compiled.append(type(model).__name__))
    assert sampled(shipped, tmp_path / "fox.png", "--compile").exit_code == 0
    assert compiled == ["UNet2DConditionModel"]


def test_compile_compiles_a_whole_model_without_repeated_blocks(
    shipped: Shipped, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_pipeline("sd1")
    compiled: list[Any] = []
    monkeypatch.setattr(type(pipe.unet), "_repeated_blocks", [])
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: compiled.append(model))
    pipeline.compile_denoiser(pipe, load_fusion(shipped.artifact))
    assert compiled == [pipe.unet]
