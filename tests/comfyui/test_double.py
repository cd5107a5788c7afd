"""The double of ComfyUI does what ComfyUI does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.comfyui import keys, models, patching, sampling
from support.comfyui.kits import CHECKOUT, NEEDS_COMFYUI, Comfy, Double, pack
from support.comfyui.sampling import SAMPLERS, Sampler
from torch import nn

pytestmark = pytest.mark.skipif(not CHECKOUT, reason=NEEDS_COMFYUI)


@pytest.fixture(scope="module")
def comfy() -> Comfy:
    return Comfy()


@pytest.mark.parametrize("make", [models.flux, models.sd1, models.wan])
def test_key_maps_of_models_agree(comfy: Comfy, make: Any) -> None:
    """On the double's models; ComfyUI's map also has other spellings."""
    import comfy.lora

    model = make()
    own, real = keys.model_lora_keys_unet(model, {}), comfy.lora.model_lora_keys_unet(model, {})
    plain = {
        name: key for name, key in own.items() if "blocks_0_" not in name or "_blocks_0" in name
    }
    known = {f"lora_unet_{name}" for name in keys.OF_SD1.values()}
    for name in plain.keys() - known:
        assert real[name] == own[name]


def test_names_of_sd1_agree(comfy: Comfy) -> None:
    import comfy.lora

    real = comfy.lora.model_lora_keys_unet(comfy_model("sd1"), {})
    for module, name in keys.OF_SD1.items():
        assert real[f"lora_unet_{name}"] == f"diffusion_model.{module}.weight"


def comfy_model(name: str) -> Any:
    from support.comfyui.tiny import tiny_model

    return tiny_model(name)


def test_modules_of_the_double_have_the_names_and_shapes_of_comfyui(comfy: Comfy) -> None:
    for make, name in ((models.flux, "flux"), (models.sd1, "sd1"), (models.wan, "wan")):
        double = {key: tuple(value.shape) for key, value in make().state_dict().items()}
        real = comfy_model(name).state_dict()
        # The norm has another name in later versions, and acts on heads.
        norm = {comfy.flux_norm(make())} if name == "flux" else set()
        assert {k for k in double if "patch_in" not in k} - real.keys() <= norm
        shared = (double.keys() & real.keys()) - norm
        if name in ("flux", "wan"):
            assert {k for k in shared if double[k] != tuple(real[k].shape)} == set()


def test_key_maps_and_readers_of_clip_agree(comfy: Comfy) -> None:
    import comfy.lora

    clip = nn.Module()
    inside = "clip_l.transformer.text_model.encoder.layers.1"
    for name in ("self_attn.q_proj", "mlp.fc2"):
        models.add(clip, f"{inside}.{name}", nn.Linear(4, 4))
    models.add(clip, f"{inside}.layer_norm1", nn.LayerNorm(4))
    own, real = keys.model_lora_keys_clip(clip, {}), comfy.lora.model_lora_keys_clip(clip, {})
    assert own.items() <= real.items()
    name = f"{inside}.mlp.fc2"
    lora = {
        f"{name}.lora_up.weight": torch.randn(4, 2),
        f"{name}.lora_down.weight": torch.randn(2, 4),
        f"{name}.diff_b": torch.randn(4),
    }
    to_load = {name: f"{name}.weight"}
    for patches, kit in (
        (keys.load_lora(lora, to_load), Double()),
        (comfy.lora.load_lora(lora, to_load), comfy_kit()),
    ):
        models.filled(clip)
        before = {key: value.clone() for key, value in clip.state_dict().items()}
        patcher = kit.patcher(clip)
        patcher.add_patches(patches, 1.0)
        kit.load(patcher)
        delta = lora[f"{name}.lora_up.weight"] @ lora[f"{name}.lora_down.weight"]
        found = clip.get_parameter(f"{name}.weight") - before[f"{name}.weight"]
        torch.testing.assert_close(found, delta, atol=1e-5, rtol=1e-5)
        bias = clip.get_parameter(f"{name}.bias") - before[f"{name}.bias"]
        torch.testing.assert_close(bias, lora[f"{name}.diff_b"], atol=1e-5, rtol=1e-5)
        patcher.detach()


def comfy_kit() -> Comfy:
    return Comfy()


@pytest.mark.parametrize("steps", [1, 5, 7, 60])
@pytest.mark.parametrize("name", ["flux", "sd1"])
@pytest.mark.parametrize("scheduler", sampling.SCHEDULER_NAMES)
def test_schedulers_make_the_same_levels(
    comfy: Comfy, scheduler: str, name: str, steps: int
) -> None:
    import comfy.samplers

    levels = comfy_model(name).model_sampling
    own = sampling.calculate_sigmas(levels, scheduler, steps)
    real = comfy.samplers.calculate_sigmas(levels, scheduler, steps)
    torch.testing.assert_close(own, real)


@pytest.mark.parametrize("name", ["euler", "heun", "euler_cfg_pp"])
def test_samplers_evaluate_and_report_in_the_same_order(
    comfy: Comfy, acting: Any, name: str
) -> None:
    import comfy.samplers

    rehearse = pack("rehearsal").rehearse
    patcher = comfy_kit().patcher(comfy_model("flux"))
    guider = comfy.samplers.CFGGuider(patcher)
    guider.inner_model = patcher.model
    sigmas, noise = torch.linspace(1, 0, 6), torch.ones(1, 16, 8, 8)
    found = [
        rehearse(sampler, guider, sigmas, {"model_options": {}, "seed": 0}, noise)
        for sampler in (Sampler(SAMPLERS[name]), comfy.samplers.sampler_object(name))
    ]
    assert found[0].evaluations == found[1].evaluations


def test_patchers_inject_eject_and_restore_in_the_same_order(comfy: Comfy) -> None:
    from comfy.patcher_extension import PatcherInjection

    assert history(Double(), patching.PatcherInjection) == history(comfy_kit(), PatcherInjection)


def history(kit: Any, injection: Any) -> list[str]:
    """What a patcher does with injections through loads, clones, patches and a bare run."""
    told: list[str] = []
    model = kit.flux()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    name = "diffusion_model.img_in.weight"

    def tell(event: str) -> Any:
        def call(patcher: Any) -> None:
            weight = patcher.model.get_parameter(name)
            told.append(f"{event}, {'bare' if torch.equal(weight, before[name]) else 'patched'}")

        return call

    bare = kit.patcher(model)
    own = bare.clone()
    own.set_injections("test", [injection(inject=tell("inject"), eject=tell("eject"))])
    told.append("load")
    kit.load(own)
    told.append("load again")
    kit.load(own)
    patched = own.clone()
    delta = torch.ones_like(before[name])
    told.append("patch")
    patched.add_patches({name: delta if kit.name == "double" else ("diff", (delta,))}, 1.0)
    told.append("load a clone")
    kit.load(patched)
    told.append("load the bare one")
    kit.load(bare)
    tell("at the end")(bare)
    return told


def test_nodes_have_the_same_schema(
    comfy: Comfy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert described(Double(), tmp_path, monkeypatch) == described(
        comfy_kit(), tmp_path, monkeypatch
    )


def described(kit: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    import sys

    for name, module in kit.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys.modules["folder_paths"], "models_dir", str(folder))
    monkeypatch.setattr(sys.modules["folder_paths"], "folder_names_and_paths", {})
    import asyncio

    listed = asyncio.run(asyncio.run(pack().comfy_entrypoint()).get_node_list())
    return [
        (
            (found := node.GET_SCHEMA()).node_id,
            [
                (
                    str(each.io_type),
                    each.id,
                    each.optional,
                    getattr(each, "default", None),
                    getattr(each, "options", None),
                    getattr(each, "min", None),
                    getattr(each, "max", None),
                )
                for each in found.inputs
            ],
            [(str(each.io_type), each.display_name) for each in found.outputs],
        )
        for node in listed
    ]


def test_noise_levels_agree(comfy: Comfy, clock: Any) -> None:
    for name, own in (("flux", sampling.FlowSampling()), ("sd1", sampling.DiscreteSampling())):
        real = comfy_model(name).model_sampling
        for sigma in (0.02, 0.3, 0.9, *([9.0] if name == "sd1" else [])):
            assert clock.noise_level(own, sigma) == pytest.approx(
                clock.noise_level(real, sigma), abs=1e-4
            )
        assert float(real.sigma_max) == pytest.approx(own.sigma_max, rel=1e-4)
