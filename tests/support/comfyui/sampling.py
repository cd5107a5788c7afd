"""The double of ``comfy.samplers``: schedulers, samplers, and the loop around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support.comfyui.patching import Executor, ModelPatcher, WrappersMP

_LOADED: dict[int, ModelPatcher] = {}


class CONST:
    """Flow matching: the sample is a straight line from noise to the picture."""

    def noise_scaling(self, sigma: Any, noise: Any, latent: Any, _: bool) -> Any:
        return sigma * noise + (1.0 - sigma) * latent

    def inverse_noise_scaling(self, sigma: Any, latent: Any) -> Any:
        return latent / (1.0 - sigma)


class FlowSampling(CONST):
    """The ``model_sampling`` of a flow model without a shift."""

    sigma_max = 1.0
    sigmas = torch.arange(1, 1001, dtype=torch.float32) / 1000


class DiscreteSampling:
    """The ``model_sampling`` of a model with a table of training steps."""

    def __init__(self) -> None:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        kept = torch.cumprod(1.0 - betas, 0)
        self.sigmas = (((1 - kept) / kept) ** 0.5).to(torch.float32)
        self.log_sigmas = self.sigmas.log()
        self.sigma_max = float(self.sigmas[-1])

    def noise_scaling(self, sigma: Any, noise: Any, latent: Any, _: bool) -> Any:
        return sigma * noise + latent

    def inverse_noise_scaling(self, sigma: Any, latent: Any) -> Any:
        return latent


SCHEDULER_NAMES = ["simple", "ddim_uniform"]


def calculate_sigmas(sampling: Any, scheduler: str, steps: int) -> torch.Tensor:
    """Noise levels of a whole schedule out of a model's table, ``ddim_uniform`` without its last.

    The spacing of ``ddim_uniform`` is whole, so it may make more steps than it is asked for.
    """
    table, count = sampling.sigmas, len(sampling.sigmas)
    if scheduler == "simple":
        chosen = [count - 1 - int(step * count / steps) for step in range(steps)]
    else:
        chosen = list(range(1, count, max(count // steps, 1)))[::-1]
    return torch.cat([table[chosen], torch.zeros(1)])


class Guider:
    """What asks the model, under the wrappers of its patcher."""

    def __init__(self, patcher: ModelPatcher) -> None:
        self.model_patcher = patcher
        self.inner_model = patcher.model

    def __call__(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> Any:
        wrappers = self.model_patcher.wrappers_of(WrappersMP.PREDICT_NOISE)
        return Executor(self.predict, self, wrappers).execute(x, timestep, model_options, seed)

    def predict(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> Any:
        denoised = self.inner_model.denoised(x, timestep)
        for function in (model_options or {}).get("sampler_post_cfg_function", ()):
            denoised = function(
                {"denoised": denoised, "uncond_denoised": denoised, "sigma": timestep}
            )
        return denoised


class Sampler:
    """A sampler's function, and the scaling of noise before it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.sampler_function = function

    def sample(
        self,
        guider: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: torch.Tensor,
        latent_image: Any = None,
        denoise_mask: Any = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        sampling = guider.inner_model.model_sampling
        x = sampling.noise_scaling(sigmas[0], noise, latent_image, True)

        def report(told: dict[str, Any]) -> None:
            if callback is not None:
                callback(told["i"], told["denoised"], told["x"], len(sigmas) - 1)

        found = self.sampler_function(guider, x, sigmas, extra_args, report)
        ended: torch.Tensor = sampling.inverse_noise_scaling(sigmas[-1], found)
        return ended


def sample_euler(model: Any, x: Any, sigmas: Any, extra: Any, report: Any) -> Any:
    """One evaluation in each step."""
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra)
        report({"x": x, "i": i, "denoised": denoised})
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def sample_heun(model: Any, x: Any, sigmas: Any, extra: Any, report: Any) -> Any:
    """Two evaluations in each step but the last; the second at the noise level of the next."""
    ones = x.new_ones(len(x))
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * ones, **extra)
        report({"x": x, "i": i, "denoised": denoised})
        slope, width = (x - denoised) / sigmas[i], sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] > 0:
            ahead = x + slope * width
            second = model(ahead, sigmas[i + 1] * ones, **extra)
            slope = (slope + (ahead - second) / sigmas[i + 1]) / 2
        x = x + slope * width
    return x


def sample_euler_cfg_pp(model: Any, x: Any, sigmas: Any, extra: Any, report: Any) -> Any:
    """One evaluation in each step, of which it takes what the negative prompt alone gives."""
    seen: list[Any] = []

    def keep(told: dict[str, Any]) -> Any:
        seen[:] = [told["uncond_denoised"]]
        return told["denoised"]

    options = dict(extra.get("model_options", {}))
    options["sampler_post_cfg_function"] = [*options.get("sampler_post_cfg_function", ()), keep]
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), model_options=options)
        report({"x": x, "i": i, "denoised": denoised})
        x = denoised + (x - seen[0]) / sigmas[i] * sigmas[i + 1]
    return x


def sample_dpm_adaptive(model: Any, x: Any, sigmas: Any, extra: Any, report: Any) -> Any:
    """As many evaluations as the numbers ask for."""
    sigma, i = float(sigmas[0]), 0
    while sigma > 0.05:
        denoised = model(x, sigma * x.new_ones(len(x)), **extra)
        report({"x": x, "i": i, "denoised": denoised})
        share = float((x - denoised).abs().mean() / x.abs().mean())
        shrunk = sigma * min(max(share, 0.3), 0.95)
        x = x + (x - denoised) / sigma * (shrunk - sigma)
        sigma, i = shrunk, i + 1
    return x


SAMPLERS = {
    function.__name__.removeprefix("sample_"): function
    for function in (sample_euler, sample_heun, sample_euler_cfg_pp, sample_dpm_adaptive)
}


def load(patcher: ModelPatcher) -> None:
    """Load a patcher; a clone of it that is loaded goes first."""
    before = _LOADED.get(id(patcher.model))
    if before is not None and before is not patcher:
        before.detach()
    patcher.patch_model()
    _LOADED[id(patcher.model)] = patcher


def sample(
    patcher: ModelPatcher,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    function: Callable[..., Any],
    callback: Any = None,
    latent: torch.Tensor | None = None,
) -> torch.Tensor:
    """Load a patcher and run a sampler under its wrappers."""
    load(patcher)
    latent = torch.zeros_like(noise) if latent is None else latent
    guider, sampler = Guider(patcher), Sampler(function)
    executor = Executor(sampler.sample, sampler, patcher.wrappers_of(WrappersMP.SAMPLER_SAMPLE))
    extra = {"model_options": dict(patcher.model_options), "seed": 0}
    found: torch.Tensor = executor.execute(
        guider, sigmas, extra, callback, noise, latent, None, True
    )
    return found
