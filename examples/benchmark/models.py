"""Models to time: real configurations of diffusers with random weights; nothing is downloaded.

``sd1``, ``sdxl`` and ``flux`` have the sizes of Stable Diffusion 1.5, XL base 1.0 and FLUX.1 dev:
the defaults of their classes in diffusers, changed by the ``config.json`` of the published
denoisers. The reduced models have fewer and narrower layers of the same kinds. There is only the
denoiser: prompts are random embeddings, and the results are latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from bare_pipelines import bare_pipeline, noise
from tiny_pipeline import OUTPUT_SCALE, SD_BETAS
from torch import nn

from klora_runtime.devices.device_types import type_of
from klora_runtime.errors import ConfigError

_PIXELS_PER_LATENT = 8
_TOKENS = 77
_FLUX_TOKENS = 512

#: diffusers' classes have no types.
_DIFFUSERS: Any = diffusers


@dataclass(frozen=True)
class BenchModel:
    """A denoiser and the pipeline around it."""

    name: str
    family: str
    """``sd1``, ``sdxl`` or ``flux``, which selects the pipeline class."""
    config: Mapping[str, Any]
    """Settings of the denoiser that differ from the defaults of its class."""
    resolution: int
    """Default height and width in pixels."""
    steps: int
    """Default number of steps."""
    half: torch.dtype
    """Dtype of the weights on a GPU; on a CPU they are float32."""

    @property
    def component(self) -> str:
        """The denoiser's name in the pipeline."""
        return "transformer" if self.family == "flux" else "unet"

    def dtype(self, device: torch.device) -> torch.dtype:
        """Return the dtype of the weights on ``device``."""
        return torch.float32 if type_of(device).is_host else self.half

    def denoiser(self, device: torch.device, seed: int = 0) -> nn.Module:
        """Return the denoiser with random weights on ``device``, the same for the same seed."""
        # The random state of the device stays changed: images begin from the host's numbers.
        with torch.random.fork_rng([]), torch.device(device), _default(self.dtype(device)):
            torch.manual_seed(seed)
            model = _FAMILIES[self.family].denoiser(**self.config)
        last: Any = model.proj_out if self.family == "flux" else model.conv_out
        with torch.no_grad():
            for parameter in last.parameters():
                parameter.mul_(OUTPUT_SCALE)
        return _still(model)

    def twin(self, denoiser: nn.Module, *, own_weights: bool) -> nn.Module:
        """Return a second denoiser with equal weights.

        Args:
            denoiser: the first one.
            own_weights: whether it gets copies of the weights; if not, both share the memory, which
                suits contestants that do not write base weights.
        """
        with torch.device("meta"):
            model = _FAMILIES[self.family].denoiser(**self.config)
        state = dict(denoiser.state_dict())
        if own_weights:
            state = {name: tensor.clone() for name, tensor in state.items()}
        model.load_state_dict(state, assign=True)
        return _still(model)

    def pipeline(self, denoiser: nn.Module) -> Any:
        """Return the pipeline around a denoiser, with its own scheduler."""
        pipe = _FAMILIES[self.family].pipeline(denoiser)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def arguments(self, device: torch.device, resolution: int, steps: int) -> dict[str, Any]:
        """Return the arguments of the pipeline's call for one image, with latents as output.

        Raises:
            ConfigError: the resolution is not one of this model.
        """
        multiple = 2 * _PIXELS_PER_LATENT if self.family == "flux" else 64
        if resolution < multiple or resolution % multiple:
            raise ConfigError(
                f"--resolution {resolution}: expected a multiple of {multiple} for {self.name}."
            )
        embeddings = {
            name: tensor.to(device, self.dtype(device))
            for name, tensor in _FAMILIES[self.family].prompt(self.config).items()
        }
        return {
            **embeddings,
            "height": resolution,
            "width": resolution,
            "num_inference_steps": steps,
            "output_type": "latent",
        }


@dataclass(frozen=True)
class _Family:
    """The common parts of the models of one family."""

    denoiser: Callable[..., Any]
    pipeline: Callable[[nn.Module], Any]
    prompt: Callable[[Mapping[str, Any]], dict[str, torch.Tensor]]


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Make ``dtype`` the default of new tensors inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _still(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


def _euler() -> Any:
    return _DIFFUSERS.EulerDiscreteScheduler(**SD_BETAS, steps_offset=1)


def _sd1_pipeline(unet: nn.Module) -> Any:
    return bare_pipeline(
        _DIFFUSERS.StableDiffusionPipeline,
        unet=unet,
        scheduler=_euler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl_pipeline(unet: nn.Module) -> Any:
    return bare_pipeline(
        _DIFFUSERS.StableDiffusionXLPipeline,
        2,
        unet=unet,
        scheduler=_euler(),
        add_watermarker=False,
    )


def _flux_pipeline(transformer: nn.Module) -> Any:
    scheduler = _DIFFUSERS.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return bare_pipeline(_DIFFUSERS.FluxPipeline, 2, transformer=transformer, scheduler=scheduler)


def _sd1_prompt(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    width = config["cross_attention_dim"]
    return {
        "prompt_embeds": noise(1, _TOKENS, width, seed=1),
        "negative_prompt_embeds": noise(1, _TOKENS, width, seed=2),
    }


def _sdxl_prompt(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    times = 6 * config["addition_time_embed_dim"]
    pooled = config["projection_class_embeddings_input_dim"] - times
    return _sd1_prompt(config) | {
        "pooled_prompt_embeds": noise(1, pooled, seed=3),
        "negative_pooled_prompt_embeds": noise(1, pooled, seed=4),
    }


def _flux_prompt(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {
        "prompt_embeds": noise(1, _FLUX_TOKENS, config["joint_attention_dim"], seed=1),
        "pooled_prompt_embeds": noise(1, config["pooled_projection_dim"], seed=3),
    }


_FAMILIES: Mapping[str, _Family] = {
    "sd1": _Family(_DIFFUSERS.UNet2DConditionModel, _sd1_pipeline, _sd1_prompt),
    "sdxl": _Family(_DIFFUSERS.UNet2DConditionModel, _sdxl_pipeline, _sdxl_prompt),
    "flux": _Family(_DIFFUSERS.FluxTransformer2DModel, _flux_pipeline, _flux_prompt),
}

#: unet/config.json of Stable Diffusion 1.5; the rest are the class's defaults.
_SD1 = {"sample_size": 64, "cross_attention_dim": 768}

#: unet/config.json of Stable Diffusion XL base 1.0.
_SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

#: transformer/config.json of FLUX.1 dev.
_FLUX = {"guidance_embeds": True, "joint_attention_dim": 4096, "pooled_projection_dim": 768}

_TINY_UNET = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
}

_BFLOAT16, _FLOAT16 = torch.bfloat16, torch.float16

#: Name -> model, the full sizes first.
MODELS: Mapping[str, BenchModel] = {
    model.name: model
    for model in (
        BenchModel("sd1", "sd1", _SD1, 512, 20, _FLOAT16),
        BenchModel("sdxl", "sdxl", _SDXL, 1024, 20, _FLOAT16),
        BenchModel("flux", "flux", _FLUX, 1024, 20, _BFLOAT16),
        BenchModel(
            "sd1-small",
            "sd1",
            _SD1 | {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 1},
            128,
            20,
            _FLOAT16,
        ),
        BenchModel(
            "sdxl-small",
            "sdxl",
            _SDXL
            | {
                "block_out_channels": (128, 256, 512),
                "transformer_layers_per_block": (1, 2, 4),
                "attention_head_dim": (2, 4, 8),
                "cross_attention_dim": 768,
                "layers_per_block": 1,
            },
            128,
            20,
            _FLOAT16,
        ),
        BenchModel(
            "flux-small",
            "flux",
            {
                "num_layers": 2,
                "num_single_layers": 4,
                "num_attention_heads": 6,
                "joint_attention_dim": 1024,
                "pooled_projection_dim": 768,
            },
            128,
            20,
            _BFLOAT16,
        ),
        BenchModel("sd1-tiny", "sd1", _TINY_UNET, 64, 4, _FLOAT16),
        BenchModel(
            "flux-tiny",
            "flux",
            {
                "num_layers": 1,
                "num_single_layers": 2,
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "joint_attention_dim": 32,
                "pooled_projection_dim": 16,
                "axes_dims_rope": (2, 2, 4),
            },
            64,
            4,
            _BFLOAT16,
        ),
    )
}


def default_model(device: torch.device) -> str:
    """Return the most informative model that runs in reasonable time on ``device``."""
    return "sdxl-small" if type_of(device).is_host else "sdxl"
