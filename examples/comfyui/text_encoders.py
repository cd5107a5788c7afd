"""Text encoders have no step: what a fusion adds to them is an ordinary LoRA of ComfyUI."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from klora_runtime.artifact.delta import Dense, LowRank
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.schedule import TEXT_ENCODERS
from klora_runtime.errors import ConfigError, IncompatibleModelError, shown
from klora_runtime.families.backwards import Backwards
from klora_runtime.families.catalogue import FAMILIES
from klora_runtime.families.family import Family

_WEIGHT, _BIAS = "weight", "bias"


def layers_of(fusion: Fusion) -> list[Entry]:
    """Return the layers of text encoders that a fusion changes."""
    return [e for e in fusion.entries if e.acts and e.component in TEXT_ENCODERS]


def apply_to_clip(clip: Any, fusion: Fusion, weights: Mapping[str, float]) -> Any:
    """Return a clone of ComfyUI's ``CLIP`` with what a fusion adds to it.

    Args:
        weights: slot -> factor on its deltas; a missing slot has 1.

    Raises:
        IncompatibleModelError: the CLIP lacks some layers; ``issues`` lists them.
    """
    from comfy.lora import load_lora, model_lora_keys_clip

    entries = layers_of(fusion)
    new = clip.clone()
    if not entries:
        return new
    if fusion.is_thin:
        raise ConfigError(
            "the artifact is thin: the numbers of its LoRAs are in their files. Compile it again "
            "without --thin."
        )
    keys = model_lora_keys_clip(clip.cond_stage_model, {})
    files = [
        _as_lora(FAMILIES[key], entries, keys, weights)
        for key in fusion.candidates
        if key in FAMILIES
    ]
    if not files:
        raise IncompatibleModelError(
            "the artifact does not say which base model it is for. Compile it again with --family "
            "KEY."
        )
    tensors, names, missing = min(files, key=lambda each: len(each[2]))
    if missing:
        raise IncompatibleModelError(
            f"{len(missing)} of {len(entries)} layers of text encoders in the artifact are not in "
            "this CLIP; nothing was changed. Load the text encoders that the artifact was compiled "
            "for, or leave the input clip empty.",
            missing,
        )
    taken = new.add_patches(load_lora(tensors, names, log_missing=False), 1.0)
    if len(set(taken)) != len(entries):
        raise IncompatibleModelError(
            f"ComfyUI takes {len(set(taken))} of {len(entries)} layers of text encoders in the "
            "artifact; nothing was changed. Leave the input clip empty, and report this."
        )
    return new


def _as_lora(
    family: Family, entries: Sequence[Entry], keys: Mapping[str, Any], weights: Mapping[str, float]
) -> tuple[dict[str, torch.Tensor], dict[str, str], list[str]]:
    """Return the tensors of a LoRA, name -> parameter of the CLIP, and the layers it lacks."""
    tensors: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}
    missing: list[str] = []
    for entry in entries:
        found = (keys.get(name) for name in _names(family, entry))
        key = next((key for key in found if isinstance(key, str)), None)
        if key is None or entry.parameter not in (_WEIGHT, _BIAS):
            missing.append(shown(entry.layer))
            continue
        name = key.removesuffix(f".{_WEIGHT}")
        names[name] = key
        tensors |= {f"{name}.{end}": value for end, value in _tensors(entry, weights)}
    return tensors, names, missing


def _names(family: Family, entry: Entry) -> Iterator[str]:
    """Yield the names of a layer in ComfyUI's key map: the full one, then the trainers'."""
    encoder = next((e for e in family.text_encoders if e.component == entry.component), None)
    if encoder is None:
        return
    home = Backwards(encoder.model.written).home(entry.module)
    module = entry.module if home is None else home.module
    if encoder.comfy is not None:
        for path in dict.fromkeys((module, entry.module)):
            yield f"text_encoders.{encoder.comfy}.transformer.{path}"
    for prefix in (encoder.kohya, *encoder.others):
        if prefix is not None:
            yield prefix + module.replace(".", "_")


def _tensors(entry: Entry, weights: Mapping[str, float]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ending and tensor of what all slots of an entry add together."""
    row = entry.timeline.at(0.0)
    sizes = {s: row[s] * held.scale * weights.get(s, 1.0) for s, held in entry.acting.items()}
    deltas = [(sizes[slot], held.delta) for slot, held in entry.acting.items()]
    if all(isinstance(delta, LowRank) for _, delta in deltas) and entry.parameter == _WEIGHT:
        pairs = [(size, delta.flattened().to(dtype=torch.float32)) for size, delta in deltas]
        yield "lora_down.weight", torch.cat([delta.down for _, delta in pairs])
        yield "lora_up.weight", torch.cat([size * delta.up for size, delta in pairs], dim=1)
        return
    total = torch.zeros(entry.shape, dtype=torch.float32)
    for size, delta in deltas:
        values = delta.values if isinstance(delta, Dense) else delta.matrix(torch.float32)
        total += size * values.to(torch.float32).reshape(entry.shape)
    yield ("diff" if entry.parameter == _WEIGHT else "diff_b"), total
