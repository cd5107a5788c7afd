"""Fusions on tiny models of ComfyUI, against the literal computation and diffusers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from support.comfyui.kits import CHECKOUT, NEEDS_COMFYUI, Comfy
from support.comfyui.literal import error, flat, literally, observed, unchanged
from support.handmade import hand_entry, hand_fusion

from klora_runtime.artifact.fusion import Fusion
from klora_runtime.layers.choice import choose
from klora_runtime.layers.live_fusion import LiveFusion
from klora_runtime.layers.targets import find_targets

pytestmark = pytest.mark.skipif(not CHECKOUT, reason=NEEDS_COMFYUI)

STEPS = 4
FAMILIES = ("flux", "sd1", "sdxl", "z-image", "wan", "qwen-image")


@pytest.fixture(scope="module")
def comfy() -> Comfy:
    return Comfy()


def fusion_of(name: str) -> Fusion:
    """A fusion of every layer of a model that has a matrix or a kernel."""
    from support.comfyui.tiny import FAMILIES, numbers_of

    family = FAMILIES[name]
    shapes = {
        path.removesuffix(".weight"): tuple(places.shape)
        for path, places in numbers_of(name).items()
        if path.endswith(".weight") and places.dim() > 1
    }
    entries = [
        hand_entry(
            f"{family.component}.{path}",
            shape,
            switch=0.1 + 0.8 * index / len(shapes),
            size=0.05,
            seed=index,
        )
        for index, (path, shape) in enumerate(shapes.items())
    ]
    return hand_fusion(*entries, family=family.family)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_equals_the_literal_computation(
    comfy: Comfy, acting: Any, name: str, sampler: str
) -> None:
    from support.comfyui.tiny import numbers_of, tiny_model

    patcher = comfy.patcher(tiny_model(name))
    fusion = fusion_of(name)
    bare = comfy.sample(patcher, sampler, steps=STEPS)
    with unchanged(patcher.model):
        own = acting.apply_to(patcher, acting.Applied(fusion))
        found = comfy.sample(own, sampler, steps=STEPS)
    progress = [
        (step + 0.5) / STEPS for step in observed(comfy, patcher, sampler, steps=STEPS).steps
    ]
    expected = literally(
        comfy, patcher, [(fusion, {})], numbers_of(name), progress, sampler, steps=STEPS
    )
    assert error(found, bare) > 0.01
    assert error(found, expected) < 1e-5
    assert torch.equal(comfy.sample(patcher, sampler, steps=STEPS), bare)


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_gives_the_same_latents(comfy: Comfy, acting: Any, name: str) -> None:
    from support.comfyui.tiny import noise_for, tiny_model

    model = tiny_model(name)
    patcher, fusion = comfy.patcher(model), fusion_of(name)
    found = comfy.sample(acting.apply_to(patcher, acting.Applied(fusion)), steps=STEPS)
    sigmas: list[float] = []

    def keep(executor: Any, guider: Any, levels: Any, *args: Any, **kwargs: Any) -> Any:
        sigmas.extend(levels.tolist())
        return executor(guider, levels, *args, **kwargs)

    looking = patcher.clone()
    looking.add_wrapper_with_key("sampler_sample", "levels", keep)
    comfy.sample(looking, steps=STEPS)
    twin = twin_of(name, model)
    fused = LiveFusion(
        fusion, choose("merge", find_targets({component_of(name): twin}, fusion), {})[0], {}
    )
    fused.write()
    x = model.model_sampling.noise_scaling(
        torch.tensor(sigmas[0]), noise_for(model), torch.zeros_like(noise_for(model)), True
    )
    for step, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        fused.move((step + 0.5) / STEPS)
        with torch.no_grad():
            positive, negative = (PREDICTED[name](twin, model, x, sigma, i) for i in range(2))
        denoised = negative + 2.0 * (positive - negative)
        x = x + (x - denoised) / sigma * (after - sigma)
    assert error(model.process_latent_in(found), x) < 1e-4


def component_of(name: str) -> str:
    from support.comfyui.tiny import FAMILIES

    return FAMILIES[name].component


def twin_of(name: str, model: Any) -> Any:
    """diffusers' model with ComfyUI's weights."""
    from support.comfyui.tiny import FAMILIES, numbers_of

    numbers = flat(model)
    twin = FAMILIES[name].twin()
    twin.load_state_dict({path: numbers[places] for path, places in numbers_of(name).items()})
    return twin.eval().requires_grad_(False)


def prompt(model: Any, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
    from support.comfyui.tiny import conditioning

    encoded, more = conditioning(model)[index][0]
    return encoded, more


def by_flux(twin: Any, model: Any, x: torch.Tensor, sigma: float, index: int) -> torch.Tensor:
    encoded, more = prompt(model, index)
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    tokens = torch.nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
    places = torch.zeros(height, width, 3)
    places[..., 1] += torch.arange(height)[:, None]
    places[..., 2] += torch.arange(width)[None, :]
    flow = twin(
        hidden_states=tokens,
        timestep=torch.tensor([sigma]),
        guidance=torch.tensor([more["guidance"]]),
        pooled_projections=more["pooled_output"],
        encoder_hidden_states=encoded,
        txt_ids=torch.zeros(encoded.shape[1], 3),
        img_ids=places.reshape(-1, 3),
    ).sample
    flow = flow.transpose(1, 2).unflatten(2, (height, width))
    return x - sigma * torch.nn.functional.pixel_shuffle(flow, 2)


def by_sd1(twin: Any, model: Any, x: torch.Tensor, sigma: float, index: int) -> torch.Tensor:
    encoded, _ = prompt(model, index)
    step = model.model_sampling.timestep(torch.tensor([sigma]))
    scaled = x / (sigma**2 + 1.0) ** 0.5
    noise: torch.Tensor = twin(scaled, step, encoder_hidden_states=encoded).sample
    return x - sigma * noise


def by_sdxl(twin: Any, model: Any, x: torch.Tensor, sigma: float, index: int) -> torch.Tensor:
    encoded, more = prompt(model, index)
    height, width = (8.0 * side for side in x.shape[-2:])
    noise: torch.Tensor = twin(
        x / (sigma**2 + 1.0) ** 0.5,
        model.model_sampling.timestep(torch.tensor([sigma])),
        encoder_hidden_states=encoded,
        added_cond_kwargs={
            "text_embeds": more["pooled_output"],
            "time_ids": torch.tensor([[height, width, 0.0, 0.0, height, width]]),
        },
    ).sample
    return x - sigma * noise


def by_z_image(twin: Any, model: Any, x: torch.Tensor, sigma: float, index: int) -> torch.Tensor:
    encoded, _ = prompt(model, index)
    found = twin([x[0].unsqueeze(1)], torch.tensor([1.0 - sigma]), [encoded[0]]).sample
    backwards: torch.Tensor = found[0].squeeze(1)[None]
    return x + sigma * backwards


def by_qwen(twin: Any, model: Any, x: torch.Tensor, sigma: float, index: int) -> torch.Tensor:
    encoded, _ = prompt(model, index)
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    tokens = torch.nn.functional.pixel_unshuffle(x[:, :, 0], 2).flatten(2).transpose(1, 2)
    flow = twin(
        hidden_states=tokens,
        timestep=torch.tensor([sigma]),
        encoder_hidden_states=encoded,
        encoder_hidden_states_mask=torch.ones(encoded.shape[:2]),
        img_shapes=[[(1, height, width)]],
    ).sample
    flow = flow.transpose(1, 2).unflatten(2, (height, width))
    return x - sigma * torch.nn.functional.pixel_shuffle(flow, 2).unsqueeze(2)


def by_wan(twin: Any, model: Any, x: torch.Tensor, sigma: float, index: int) -> torch.Tensor:
    encoded, _ = prompt(model, index)
    flow: torch.Tensor = twin(
        hidden_states=x, timestep=torch.tensor([1000 * sigma]), encoder_hidden_states=encoded
    ).sample
    return x - sigma * flow


#: Family -> (twin, ComfyUI's model, x, sigma, index of the prompt) -> the denoised latent.
PREDICTED: Mapping[str, Callable[..., torch.Tensor]] = {
    "flux": by_flux,
    "sd1": by_sd1,
    "sdxl": by_sdxl,
    "z-image": by_z_image,
    "wan": by_wan,
    "qwen-image": by_qwen,
}
