"""What all pictures of a sweep have in common: LoRAs, model, and how they act on it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from klora_compile.reading.adapter import Adapter
from klora_compile.reading.provenance import source_stated
from klora_runtime import __version__
from klora_runtime.artifact.canonical import canonical_json, parse_json

#: Numbers of each tensor that a fingerprint looks at, evenly spread.
_LOOKED_AT = 64

#: Notes on where files were, which changes no picture.
_PLACES = ("hub", "base")


def inputs_of(pipe: Any, adapters: Mapping[str, Adapter], mode: str) -> dict[str, Any]:
    """Return JSON values that are equal if equal trials make equal pictures.

    Args:
        pipe: the pipeline, without a fusion.
        adapters: source -> LoRA.
        mode: how fusions are asked to act.
    """
    loras = {}
    for name, adapter in adapters.items():
        stated = source_stated(adapter)
        notes = {key: value for key, value in stated.notes.items() if key not in _PLACES}
        loras[name] = {"file": stated.file, "sha256": stated.sha256, "notes": notes}
    found = {
        "loras": loras,
        "pipeline": type(pipe).__name__,
        "model": _fingerprint(pipe),
        "device": getattr(getattr(pipe, "device", None), "type", "unknown"),
        "mode": mode,
        "version": __version__,
    }
    return dict(parse_json(canonical_json(found)))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each input that differs."""
    flat = [dict(_flat(each)) for each in (before, now)]
    return [
        f"{name}: the folder was begun with {flat[0].get(name, 'none')}, found "
        f"{flat[1].get(name, 'none')}"
        for name in sorted(flat[0].keys() | flat[1].keys())
        if flat[0].get(name) != flat[1].get(name)
    ]


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{before}{name}.")
        else:
            found.append((f"{before}{name}", str(value)))
    return found


def _fingerprint(pipe: Any) -> str:
    """Return a digest of a pipeline's parts: their settings, and numbers of each tensor."""
    digest = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        config = getattr(part, "config", None)
        # names with an underscore say where it is from, in an order that changes
        stated = config.items() if isinstance(config, Mapping) else ()
        settings = sorted(f"{key}={value}" for key, value in stated if key[:1] != "_")
        digest.update(f"{name} {type(part).__name__} {settings}".encode())
        if isinstance(part, nn.Module):
            for key, tensor in sorted(part.state_dict().items()):
                digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(_sample(tensor))
    return digest.hexdigest()


def _sample(tensor: Any) -> bytes:
    """Return some numbers of a tensor as bytes."""
    if not isinstance(tensor, torch.Tensor) or not tensor.numel() or tensor.is_meta:
        return b""
    flat = tensor.detach().flatten()
    step = max(1, flat.numel() // _LOOKED_AT)
    return flat[::step][:_LOOKED_AT].cpu().contiguous().view(torch.uint8).numpy().tobytes()
