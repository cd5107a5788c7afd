"""What a fusion is in ComfyUI, literally: before each evaluation all weights are computed anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from support.handmade import delta_of, hand_entry, hand_fusion
from torch import nn

from klora_runtime.artifact.delta import Dense
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.schedule import Rule, Slot, Source

#: Layers of a tiny FLUX.1 in diffusers' names, some of which ComfyUI joins.
FLUX_LAYERS = {
    "transformer_blocks.0.attn.to_q": (32, 32),
    "transformer_blocks.0.attn.to_k": (32, 32),
    "transformer_blocks.0.attn.to_v": (32, 32),
    "transformer_blocks.0.attn.to_out.0": (32, 32),
    "single_transformer_blocks.0.attn.to_k": (32, 32),
    "single_transformer_blocks.0.proj_mlp": (128, 32),
    "single_transformer_blocks.0.proj_out": (32, 160),
    "norm_out.linear": (64, 32),
    "x_embedder": (32, 64),
}
SD1_LAYERS = {
    "conv_in": (32, 4, 3, 3),
    "down_blocks.0.resnets.0.conv1": (32, 32, 3, 3),
    "down_blocks.0.attentions.0.proj_in": (32, 32),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (32, 32),
    "up_blocks.3.attentions.2.proj_out": (32, 32),
    "conv_out": (4, 32, 3, 3),
}


WAN_LAYERS = {
    "blocks.0.attn1.to_q": (48, 48),
    "blocks.0.attn1.to_v": (48, 48),
    "blocks.0.ffn.net.0.proj": (96, 48),
    "blocks.0.ffn.net.2": (48, 96),
    "proj_out": (64, 48),
}


def flux_fusion(seed: int = 0, size: float = 0.2) -> Fusion:
    """A fusion whose layers switch at several points, the joined ones apart from each other."""
    return _fusion("transformer", FLUX_LAYERS, "flux.1", seed, size)


def sd1_fusion() -> Fusion:
    return _fusion("unet", SD1_LAYERS, "sd1", 0, 0.2)


def wan_fusion() -> Fusion:
    """A fusion for the two models of Wan 2.2, with LoRAs and a schedule of its own for each."""
    high = _fusion("transformer", WAN_LAYERS, "wan", 0, 0.2)
    low = _fusion("transformer_2", WAN_LAYERS, "wan", 40, 0.2)
    return replace(high, entries=(*high.entries, *low.entries))


def constant(entry: Entry) -> Entry:
    """A layer on which both LoRAs act at all times, the second at half its weight."""
    coefficients = {"content": (1.0,), "style": (0.5,)}
    return replace(
        entry, timeline=replace(entry.timeline, starts=(0.0,), coefficients=coefficients)
    )


def of_one_model(fusion: Fusion, component: str) -> Fusion:
    """The layers of one of a fusion's models, as if it were the only one."""
    own = [replace(e, component="transformer") for e in fusion.entries if e.component == component]
    return replace(fusion, entries=tuple(own))


def _fusion(
    component: str, layers: Mapping[str, Sequence[int]], family: str, seed: int, size: float
) -> Fusion:
    entries = [
        hand_entry(
            f"{component}.{name}",
            shape,
            switch=0.15 + 0.7 * index / len(layers),
            size=size,
            seed=seed + index,
        )
        for index, (name, shape) in enumerate(layers.items())
    ]
    return hand_fusion(*entries, family=family)


def storable(fusion: Fusion) -> Fusion:
    """A fusion made by hand with what a file needs: its sources, and a rule with a name."""
    source = Source("fox.safetensors", "0" * 64, 1, "peft", (2,), trigger_words=("a fox",))
    slots = {name: Slot(slot.role, ("fox",)) for name, slot in fusion.slots.items()}
    entries = tuple(replace(e, scores={}) for e in fusion.entries)
    return replace(
        fusion, sources={"fox": source}, slots=slots, rule=Rule("phases", {}, {}), entries=entries
    )


def flat(model: Any) -> torch.Tensor:
    """All numbers of the denoiser, in order."""
    return torch.cat([p.detach().reshape(-1) for p in model.diffusion_model.parameters()])


def write(model: Any, numbers: torch.Tensor) -> None:
    """Write what :func:`flat` returns."""
    begin = 0
    for parameter in model.diffusion_model.parameters():
        end = begin + parameter.numel()
        parameter.data.copy_(numbers[begin:end].view(parameter.shape))
        begin = end


def delta_at(
    fusion: Fusion,
    places: Mapping[str, torch.Tensor],
    progress: float,
    weights: Mapping[str, float] | None = None,
    components: Sequence[str] = ("transformer", "unet"),
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a fusion adds at a progress: indices of numbers, and what is added to each."""
    index, added = [], []
    for entry in fusion.entries:
        if entry.component not in components:
            continue
        total = torch.zeros(entry.shape, dtype=torch.float64)
        for slot, coefficient in entry.timeline.at(progress).items():
            if slot in entry.factors:
                factor = coefficient * (weights or {}).get(slot, 1.0)
                total += factor * whole_delta(entry, slot)
        index.append(places[entry.path.partition(".")[2]].reshape(-1))
        added.append(total.reshape(-1))
    return torch.cat(index), torch.cat(added)


def whole_delta(entry: Entry, slot: str) -> torch.Tensor:
    stored = entry.factors[slot]
    if isinstance(stored.delta, Dense):
        return stored.scale * stored.delta.values.double()
    return delta_of(entry, slot)


class Literal:
    """A wrapper of the model's evaluations that writes all weights before each of them.

    Args:
        model: what the patcher holds.
        fusions: with the slots' weights.
        places: see ``tiny.numbers_of``.
        progress: progress of each evaluation of the run.
    """

    def __init__(
        self,
        model: Any,
        fusions: Sequence[tuple[Fusion, Mapping[str, float]]],
        places: Mapping[str, torch.Tensor],
        progress: Sequence[float],
    ) -> None:
        self._model, self._places = model, places
        self._fusions = fusions
        self._progress = iter(progress)

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        base, now = flat(self._model), next(self._progress)
        numbers = base.double()
        for fusion, weights in self._fusions:
            index, added = delta_at(fusion, self._places, now, weights)
            numbers.index_add_(0, index, added)
        write(self._model, numbers.to(base.dtype))
        try:
            return executor(*args, **kwargs)
        finally:
            write(self._model, base)


class Events:
    """What happens in a run, in order: the steps of evaluations, told by the run itself."""

    def __init__(self) -> None:
        self._marks: list[str] = []
        self.sigmas: list[float] = []

    def wrapper(self, executor: Any, x: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        self._marks.append("e")
        self.sigmas.append(float(timestep.flatten()[0]))
        return executor(x, timestep, *args, **kwargs)

    def callback(self, *_: Any) -> None:
        self._marks.append("c")

    @property
    def steps(self) -> list[int]:
        """The step of each evaluation: one more where the run reports after it."""
        text = "".join(self._marks)
        found, step = [], -1
        for place, mark in enumerate(text):
            if mark == "e":
                step += text[place + 1 : place + 2] == "c"
                found.append(max(step, 0))
        return found


def observed(kit: Any, patcher: Any, sampler: str, **settings: Any) -> Events:
    """Return what a run of the bare model does."""
    events, own = Events(), patcher.clone()
    own.add_wrapper_with_key("predict_noise", "events", events.wrapper)
    kit.sample(own, sampler, callback=events.callback, **settings)
    return events


def literally(
    kit: Any,
    patcher: Any,
    fusions: Sequence[tuple[Fusion, Mapping[str, float]]],
    places: Mapping[str, torch.Tensor],
    progress: Sequence[float],
    sampler: str = "euler",
    **settings: Any,
) -> torch.Tensor:
    """Sample with the weights that the fusions have at the progress of each evaluation."""
    own = patcher.clone()
    literal = Literal(patcher.model, fusions, places, progress)
    own.add_wrapper_with_key("predict_noise", "literal", literal)
    found: torch.Tensor = kit.sample(own, sampler, **settings)
    return found


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Check that a block leaves a model as it was: classes, attributes, parameters, bits."""
    before = _state(model)
    yield
    assert _state(model) == before


def _state(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[path] = type(module), type(module).__mro__, set(vars(module)) - _COMFYUIS
    for path, parameter in model.named_parameters():
        found[path + "!"] = parameter.dtype, parameter.detach().clone().numpy().tobytes()
    return found


#: What ComfyUI itself notes on modules that it loads.
_COMFYUIS = {
    "comfy_patched_weights",
    "comfy_cast_weights",
    "comfy_force_cast_weights",
    "prev_comfy_cast_weights",
    "weight_function",
    "bias_function",
    "device",
    "current_patcher",
    "current_weight_patches_uuid",
}
