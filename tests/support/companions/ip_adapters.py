"""IP-Adapters of diffusers, with random weights: what makes a picture part of the prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bare_pipelines import noise
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from support.companions.caches import FLUX
from support.companions.companion import Companion, On
from support.companions.unets import BOTH, sd1

_Weights = dict[str, dict[str, torch.Tensor]]

#: Width of an image's embedding, and how many tokens are made of it.
IMAGE_WIDTH, _IMAGE_TOKENS = 16, 4


def weights_for_unet(unet: UNet2DConditionModel) -> _Weights:
    """In the layout of the first IP-Adapter."""
    width = unet.config.cross_attention_dim
    adapter = {}
    for index, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            out = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for seed, part in enumerate(("k", "v")):
                key = f"{index}.to_{part}_ip.weight"
                adapter[key] = 0.3 * noise(out, width, seed=10 * index + seed)
    return {"image_proj": _projection(width), "ip_adapter": adapter}


def weights_for_flux(transformer: FluxTransformer2DModel) -> _Weights:
    """In the layout of XLabs'."""
    width, out = transformer.config.joint_attention_dim, transformer.inner_dim
    adapter = {}
    for index in range(transformer.config.num_layers):
        for seed, part in enumerate(("k", "v")):
            key = f"{index}.to_{part}_ip"
            adapter[f"{key}.weight"] = 0.3 * noise(out, width, seed=10 * index + seed)
            adapter[f"{key}.bias"] = torch.zeros(out)
    return {"image_proj": _projection(width), "ip_adapter": adapter}


def _projection(width: int) -> dict[str, torch.Tensor]:
    return {
        "proj.weight": 0.3 * noise(_IMAGE_TOKENS * width, IMAGE_WIDTH, seed=1),
        "proj.bias": torch.zeros(_IMAGE_TOKENS * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }


def _loaded(
    weights: Callable[[Any], _Weights], denoiser: str, no_encoder: str, **image: Any
) -> Callable[[Any], On]:
    """Loads an IP-Adapter.

    Args:
        weights: of it, for a denoiser.
        denoiser: its component's name.
        no_encoder: the option that is None where there is no image encoder.
        image: how the pipeline is given an image.
    """

    def put_on(pipe: Any) -> On:
        given = weights(getattr(pipe, denoiser))
        pipe.load_ip_adapter(given, weight_name="", subfolder=None, **{no_encoder: None})
        pipe.set_ip_adapter_scale(0.7)
        return On(pipe.unload_ip_adapter, lambda: image)

    return put_on


#: One image, and what stands for none.
EMBEDDINGS = torch.stack([noise(1, IMAGE_WIDTH, seed=4), noise(1, IMAGE_WIDTH, seed=5)])

IP_ADAPTERS = (
    Companion(
        "IP-Adapter",
        sd1(),
        _loaded(
            weights_for_unet,
            "unet",
            "image_encoder_folder",
            ip_adapter_image_embeds=[EMBEDDINGS],
        ),
        components=BOTH,
    ),
    Companion(
        "IP-Adapter of FLUX.1",
        FLUX,
        _loaded(
            weights_for_flux,
            "transformer",
            "image_encoder_pretrained_model_name_or_path",
            ip_adapter_image_embeds=[EMBEDDINGS[:1]],
            negative_ip_adapter_image_embeds=[EMBEDDINGS[1:]],
        ),
    ),
)
