"""K-LoRA as the paper states it (arXiv 2502.18461): dense, literal, recomputed at each step.

Nothing of the product is used here. A layer is a key prefix of a LoRA file, component in front;
its weight is looked up in the pipeline under that very name. Everything is float64, where no other
dtype is asked for: `examples/benchmark` times the same rule in float32, on any device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

Choice = Literal["content", "style"]
Clock = Literal["step", "noise"]
#: How a scheduler states its noise: sigma of flow matching, which may be turned round, the training
#: timestep, a sigma without an end for which there is no training, a time that falls from 1 or
#: rises to it, an angle whose tangent is such a sigma.
Level = Literal["flow", "inverted", "training", "sigma", "time", "rising time", "angle"]

#: Components of pipelines that are evaluated at every step, or one of which is.
DENOISERS = (
    *("unet", "image_unet", "text_unet", "super_res_first", "super_res_last"),
    *("transformer", "transformer_2", "unconditional_transformer"),
    *("prior", "prior_prior", "decoder"),
)


class Lora:
    """The pairs of one file with keys as PEFT writes them, optionally with alpha tensors."""

    def __init__(
        self,
        path: Path,
        *,
        ignore_alpha: bool,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        tensors = load_file(str(path))
        self._tensors = {key: tensor.to(device, dtype) for key, tensor in tensors.items()}
        self._ignore_alpha = ignore_alpha
        self.layers = [
            key.removesuffix(".lora_A.weight")
            for key in self._tensors
            if key.endswith(".lora_A.weight")
        ]

    def rank(self, layer: str) -> int:
        return self._tensors[f"{layer}.lora_A.weight"].shape[0]

    def factors(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Down, and up with the scaling in it."""
        down, up = (self._tensors[f"{layer}.lora_{part}.weight"] for part in "AB")
        alpha = float(self._tensors.get(f"{layer}.alpha", self.rank(layer)))
        scaling = 1.0 if self._ignore_alpha else alpha / self.rank(layer)
        return down, scaling * up

    def delta(self, layer: str) -> torch.Tensor:
        return product(*self.factors(layer))


@dataclass
class KLora:
    """Both LoRAs and the rule between them, by the paper or as the authors' program decides."""

    content: Path
    style: Path
    pattern: Literal["s", "s*"] = "s"
    semantics: Literal["paper", "authors"] = "paper"
    content_weight: float = 1.0
    style_weight: float = 1.0
    dtype: torch.dtype = torch.float64
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        self._content, self._style = (
            Lora(
                path,
                ignore_alpha=self.semantics == "authors",
                dtype=self.dtype,
                device=self.device,
            )
            for path in (self.content, self.style)
        )

    @property
    def layers(self) -> list[str]:
        """Of either LoRA, text encoders included."""
        return sorted({*self._content.layers, *self._style.layers})

    def pairs(self, denoiser: str) -> list[str]:
        """Layers of a denoiser that both adapt."""
        both = set(self._content.layers) & set(self._style.layers)
        return sorted(layer for layer in both if _component(layer) == denoiser)

    def s(self, t: float) -> float:
        """S(t), or S*(t): equation 7 and its wrapped form in the supplement."""
        if self.pattern == "s":
            return 1.5 * t + 0.5
        offset = 1.3 if self.semantics == "paper" else 0.85 * 1.5
        return (1.5 * t + offset) % 1.5

    def gamma(self, denoiser: str) -> float:
        """Equation 9; or the authors' mean of ratios, without those of 3 times the mean."""
        sums = [
            (l1(self._content.delta(layer)), l1(self._style.delta(layer)))
            for layer in self.pairs(denoiser)
        ]
        if self.semantics == "paper":
            return sum(c for c, _ in sums) / sum(s for _, s in sums)
        ratios = [c / s for c, s in sums if s > 0]
        mean = sum(ratios) / len(ratios)
        kept = [ratio for ratio in ratios if ratio < 3 * mean]
        return sum(kept) / len(kept)

    def choice(self, layer: str, t: float, gamma: float) -> Choice:
        """Equations 1-6 and 10 for a denoiser layer that both LoRAs adapt."""
        if not self.delta(layer, "style").any():
            return "content"
        if not self.delta(layer, "content").any():
            return "style"
        s_c, s_s = self.top_k_sums(layer)
        if self.semantics == "paper":
            return "content" if s_c >= gamma * self.s(t) * s_s else "style"
        return "content" if s_c > gamma * self.s(t) * s_s else "style"

    def top_k_sums(self, layer: str) -> tuple[float, float]:
        """Equations 1-4: of the content's delta, and of the style's."""
        k = self.k(layer)
        content, style = (top_k_sum(self.delta(layer, role), k) for role in ("content", "style"))
        return float(content), float(style)

    def k(self, layer: str) -> int:
        """How many of the largest values count."""
        down, up = self._content.factors(layer)
        ranks = self._content.rank(layer) * self._style.rank(layer)
        return min(ranks, len(up) * down[0].numel())

    def lora(self, role: Choice) -> Lora:
        return self._content if role == "content" else self._style

    def delta(self, layer: str, role: Choice) -> torch.Tensor:
        """What one of the LoRAs adds to a layer."""
        return self.lora(role).delta(layer)

    def deltas(self, t: float) -> dict[str, torch.Tensor]:
        """What every layer of the denoisers and the text encoders gets at progress t."""
        choices: dict[str, Choice] = {}
        for denoiser in DENOISERS:
            if pairs := self.pairs(denoiser):
                gamma = self.gamma(denoiser)
                choices |= {layer: self.choice(layer, t, gamma) for layer in pairs}
        deltas = {}
        for layer in self.layers:
            roles = {choices[layer]} if layer in choices else {"content", "style"}
            delta = torch.zeros(())
            if "content" in roles and layer in self._content.layers:
                delta = delta + self.content_weight * self.delta(layer, "content")
            if "style" in roles and layer in self._style.layers:
                delta = delta + self.style_weight * self.delta(layer, "style")
            deltas[layer] = delta
        return deltas


def progress_of_run(
    scheduler: Any, clock: Clock, level: Level, *, lists_the_end: bool = False
) -> list[float]:
    """The progress of each evaluation of a whole run, with timesteps that are set.

    By the clock of the steps it is the middle of the step among all steps. By the clock of the
    noise it is what is gone of the noise in the middle of the step: half of what is there before it
    and half of what is there after it. Some schedulers list the end of the last step, too.
    """
    evaluations = len(scheduler.timesteps) - lists_the_end
    order = getattr(scheduler, "order", 1)
    steps = (evaluations + order - 1) // order
    found = []
    for evaluation in range(evaluations):
        step = evaluation // order
        if clock == "step":
            found.append((step + 0.5) / steps)
            continue
        before = _noise(scheduler, level, order * step)
        after = _noise(scheduler, level, order * (step + 1))
        found.append(min(max(0.0, 1 - before / 2 - after / 2), math.nextafter(1, 0)))
    return found


def _noise(scheduler: Any, level: Level, place: int) -> float:
    """The noise at a place in a scheduler's list, none after its end."""
    values = scheduler.sigmas if level in ("flow", "inverted", "sigma") else scheduler.timesteps
    if place >= len(values):
        return 0.0
    value = float(values[place])
    if level == "training":
        return value / int(scheduler.config.num_train_timesteps)
    if level in ("inverted", "rising time"):
        return 1 - value
    if level == "angle":
        value = math.tan(min(value, math.pi / 2))
    return 1 - 1 / (1 + value) if level in ("sigma", "angle") else value


@contextmanager
def sampling(
    pipe: Any,
    klora: KLora,
    progress: Sequence[float],
    evaluated: Sequence[str] = DENOISERS,
) -> Iterator[None]:
    """Let one generation run as K-LoRA says, each denoiser evaluation at its given progress.

    Args:
        pipe: the pipeline.
        klora: the LoRAs and the rule between them.
        progress: of each evaluation.
        evaluated: the denoisers whose evaluations these are; others stay as they are.

    Where a pipeline has two denoisers, ``progress`` lists the evaluations of both in their order.
    Before every evaluation all weights are computed and written anew; a model that shares layers
    with a denoiser, as a ControlNet may, is part of the denoiser's next evaluation. The text
    encoders, which have no step, are written at the start. All weights are given back at the end.
    """
    weights = {layer: _weight(pipe, layer) for layer in klora.layers}
    base = {layer: weight.detach().clone() for layer, weight in weights.items()}
    to_come = list(progress)

    def write(t: float, *, denoiser: bool) -> None:
        for layer, delta in klora.deltas(t).items():
            if (_component(layer) in DENOISERS) == denoiser:
                exact = base[layer].double() + delta.reshape(base[layer].shape)
                weights[layer].data.copy_(exact)

    def before_evaluation(module: torch.nn.Module, args: Any) -> None:
        assert to_come, f"more than {len(progress)} evaluations of the denoisers"
        write(to_come.pop(0), denoiser=True)

    def before_sharer(*_: Any) -> None:
        if to_come:
            write(to_come[0], denoiser=True)

    write(0.0, denoiser=False)
    denoisers = [model for name in evaluated if (model := getattr(pipe, name, None)) is not None]
    hooks = [model.register_forward_pre_hook(before_evaluation) for model in denoisers]
    hooks += [model.register_forward_pre_hook(before_sharer) for model in _sharers(pipe, denoisers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, weight in weights.items():
            weight.data.copy_(base[layer])
    assert not to_come, f"{len(to_come)} of {len(progress)} evaluations did not happen"


def _sharers(pipe: Any, denoisers: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """Return the other models of a pipeline that have layers of a denoiser."""
    layers = {module for denoiser in denoisers for module in denoiser.modules()}
    return [
        model
        for model in vars(pipe).values()
        if isinstance(model, torch.nn.Module)
        and model not in layers
        and not layers.isdisjoint(model.modules())
    ]


def product(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """up @ down in the shape of the weight."""
    return (up.flatten(1) @ down.flatten(1)).reshape(-1, *down.shape[1:])


def top_k_sum(delta: torch.Tensor, k: int) -> torch.Tensor:
    """The sum of the k largest absolute values; 0-dimensional."""
    return delta.abs().flatten().topk(k).values.sum()


def l1(delta: torch.Tensor) -> float:
    return float(delta.abs().sum(dtype=torch.float64))


def _component(layer: str) -> str:
    return layer.partition(".")[0]


def _weight(pipe: Any, layer: str) -> torch.nn.Parameter:
    component, _, path = layer.partition(".")
    module = getattr(pipe, component).get_submodule(path)
    assert isinstance(module.weight, torch.nn.Parameter)
    return module.weight
