"""What trainers write into metadata tells the base model, and what klora writes is told back."""

from __future__ import annotations

import pytest

from klora_compile.families.stating import stated_family, trainers
from klora_runtime.families.catalogue import FAMILIES

#: What the trainers' own code writes as `modelspec.architecture` or `ss_base_model_version`:
#: sd-scripts (`library/sai_model_spec.py`, `*_train_network.py`), musubi-tuner
#: (`utils/sai_model_spec.py`, `dataset/architectures.py`), OneTrainer (`resources/sd_model_spec`,
#: `DtypeModelSaverMixin.py`), ai-toolkit (`get_base_model_version`).
STATED: dict[str | None, tuple[str, ...]] = {
    "sd1": ("stable-diffusion-v1/lora", "sd_v1", "sd_1.5", "stable-diffusion-v1-inpainting/lora"),
    "sd2": ("stable-diffusion-v2-768-v/lora", "stable-diffusion-v2/lora", "sd_v2_v", "sd_2.1"),
    "sdxl": ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0", "sdxl_", "sdxl_1.0"),
    "sdxl-refiner": ("stable-diffusion-xl-v1-refiner/lora",),
    "sd3": (
        *("stable-diffusion-3-medium/lora", "stable-diffusion-3-5-large/lora", "sd_3"),
        *("stable-diffusion-v3.5/lora", "stable-diffusion-v3-medium/lora"),
    ),
    "flux.1": ("flux-1-dev/lora", "flux-1/lora", "Flux.1-fill-dev/lora", "flux1", "flux.1_kontext"),
    "chroma": ("chroma/lora", "Chroma1/lora", "chroma"),
    "flux.2": ("Flux.2-dev/lora", "Flux.2/lora", "flux_2_klein_4b", "flux2_klein_9b", "flux2"),
    "qwen-image": ("Qwen-Image/lora", "Qwen-Image-Edit-2511/lora", "qwen_image_edit"),
    "z-image": ("Z-Image/lora", "z_image", "zimage"),
    "wan": ("wan2.1/lora", "wan", "wan_2.1", "wan_2.2_14b"),
    "hunyuan-video": ("hunyuan-video/lora", "hunyuan_video"),
    "lumina2": ("lumina-2/lora", "lumina/lora", "lumina2"),
    "anima": ("anima-preview/lora", "anima-unknown/lora", "Anima/lora", "anima"),
    "krea-2": ("Krea-2/lora", "krea2"),
    "auraflow": ("auraflow",),
    "ltx-2": ("ltx2", "ltx2.3"),
    "hunyuan-video-1.5": ("hunyuan-video-1.5/lora", "hunyuan_video_1_5"),
    "hunyuan-image": ("hunyuan-image-2.1/lora",),
    "qwen-image-2.1": ("qwen_image_2.1",),
    "kandinsky-5": ("Kandinsky-5/lora", "kandinsky5"),
    "pixart": ("pixart-alpha/lora", "pixart-sigma/lora", "pixart"),
    "sana": ("sana/lora",),
    "ideogram-4": ("Ideogram-4/lora", "Ideogram/lora", "ideogram4"),
    "ernie-image": ("Ernie/lora",),
    "minimax-h3": ("minimax_h3", "minimax_h3_ref2va"),
    "hidream-i1": ("hidream-i1/lora", "hidream_i1"),
    # Of base models that have no record; several begin as one that has.
    None: (
        *("framepack", "HiDream-O1-Image/lora", "zeta_chroma", "stable-cascade-v1-prior"),
        *("omnigen2", "wanderer", "fluxion", ""),
    ),
}


@pytest.mark.parametrize("key", ["modelspec.architecture", "ss_base_model_version"])
@pytest.mark.parametrize("family", STATED)
def test_every_statement_tells_its_family(family: str | None, key: str) -> None:
    for text in STATED[family]:
        assert stated_family({key: text}) == family, text


def test_every_family_that_is_stated_is_tested() -> None:
    stated = {key for key, family in FAMILIES.items() if family.stated is not None}
    assert stated == set(STATED) - {None}


def test_the_architecture_goes_before_the_version() -> None:
    both = {"modelspec.architecture": "chroma/lora", "ss_base_model_version": "flux1"}
    assert stated_family(both) == "chroma"
    assert stated_family(both | {"modelspec.architecture": "of tomorrow"}) == "flux.1"
    assert stated_family({}) is None


@pytest.mark.parametrize("key", FAMILIES)
def test_what_an_export_states_is_told_back(key: str) -> None:
    kohya = FAMILIES[key].kohya
    for name, text in () if kohya is None else kohya.metadata.items():
        if name != "ss_v2":
            assert stated_family({name: text}) == key


def test_scripts_of_one_trainer_tell_it() -> None:
    found = trainers()
    assert found["networks.lora_wan"] == found["networks.lora_krea2"] == "musubi-tuner"
    assert found["networks.lora_flux"] == "sd-scripts"
    assert "networks.lora" not in found  # both have it
