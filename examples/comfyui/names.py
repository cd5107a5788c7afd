"""Names: which parameters of ComfyUI's model the layers of a fusion change, and in which rows.

An artifact has diffusers' names. klora's tables of base models lead from them to the names in
files, and ComfyUI's own key map (``comfy.lora``) leads from those to the parameters of its model.
Where ComfyUI has in one module what diffusers has in several, each layer changes some rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.schedule import TEXT_ENCODERS
from klora_runtime.errors import ConfigError, IncompatibleModelError, shown
from klora_runtime.families.backwards import Backwards, Home
from klora_runtime.families.catalogue import FAMILIES, families_name
from klora_runtime.families.family import DENOISER_PREFIX, Family

#: The denoiser inside ComfyUI's model, as its parameters' names begin.
DENOISER = "diffusion_model."

_LAYER_PARAMETERS = ("weight", "bias")
#: What some of ComfyUI's norms call their weight.
_SCALE = "scale"

Rows = tuple[range, ...] | None


@dataclass(frozen=True)
class Place:
    """A parameter of ComfyUI's denoiser, and the layers of a fusion that change it."""

    module: str
    """Path inside the denoiser."""
    parameter: str
    shape: tuple[int, ...]
    layers: tuple[tuple[Entry, Rows], ...]
    """Each layer and the rows of the parameter that it changes; None for all."""


def denoisers_of(fusion: Fusion) -> tuple[str, ...]:
    """Return the components that a sampler evaluates, and that a denoiser of ComfyUI contains."""
    named = (DENOISER_PREFIX, *(name for f in FAMILIES.values() for name in f.denoisers))
    return tuple(name for name in fusion.components if name in named)


def components_of(fusion: Fusion, denoiser: str) -> tuple[str, ...]:
    """Return the components of a fusion that are in the model with this denoiser.

    Some models also contain what is beside the denoiser in diffusers, such as connectors; a text
    encoder is in ComfyUI's CLIP.

    Args:
        denoiser: ``auto``, or one of the denoisers of an artifact for several.

    Raises:
        ConfigError: the artifact has no such denoiser, or several and none is named.
    """
    there = denoisers_of(fusion)
    if denoiser == "auto" and len(there) > 1:
        raise ConfigError(
            f"the artifact is for {len(there)} models, {' and '.join(there)}. Set denoiser to the "
            "one that this model is: the first samples the noisy steps."
        )
    if denoiser != "auto" and denoiser not in there:
        raise ConfigError(
            f"denoiser={denoiser}: the artifact has {', '.join(there) or 'no denoiser'}. Set "
            "denoiser to auto."
        )
    others = set(there) - {denoiser} if denoiser != "auto" else set()
    return tuple(c for c in fusion.components if c not in (*TEXT_ENCODERS, *others))


def places_in(model: Any, fusion: Fusion, components: Sequence[str]) -> list[Place]:
    """Return the parameters of ComfyUI's model that layers of these components change.

    Args:
        model: what ``ModelPatcher.model`` is; its ``diffusion_model`` is the denoiser.

    Raises:
        IncompatibleModelError: the base model of the artifact is unknown, or the model lacks some
            layers; ``issues`` lists them. Nothing was changed.
    """
    from comfy.lora import model_lora_keys_unet

    if not any(key in FAMILIES for key in fusion.candidates):
        raise IncompatibleModelError(
            "the artifact does not say which base model it is for, so the names of its layers in "
            "ComfyUI are unknown. Compile it again with --family KEY."
        )
    keys = model_lora_keys_unet(model, {})
    entries = [e for e in fusion.entries if e.acts and e.component in components]
    missing: list[str] | None = None
    for family in (FAMILIES[key] for key in fusion.candidates if key in FAMILIES):
        found, own = _located(family, entries, keys)
        if not own:
            return _grouped(model.diffusion_model, found)
        if missing is None or len(own) < len(missing):
            missing = own
    assert missing is not None
    raise IncompatibleModelError(
        f"{len(missing)} of {len(entries)} layers of the artifact are not in this "
        f"{shown(type(model).__name__)}; nothing was changed. It was compiled for "
        f"{families_name(fusion.candidates)}: load that model, or compile LoRAs of this one.",
        missing,
    )


@dataclass(frozen=True)
class _Found:
    """A layer of the fusion and the module of ComfyUI's denoiser that contains it."""

    entry: Entry
    home: Home
    module: str
    parameter: str


def _located(
    family: Family, entries: Sequence[Entry], keys: Mapping[str, Any]
) -> tuple[list[_Found], list[str]]:
    """Return where the layers of a family are, and the names of those that are nowhere."""
    tables = {c: list(_tables(family, c)) for c in {entry.component for entry in entries}}
    found, missing = [], []
    for entry in entries:
        place = next(_candidates(entry, tables[entry.component], keys), None)
        if place is None:
            missing.append(shown(entry.layer))
        else:
            found.append(place)
    return found, missing


def _tables(family: Family, component: str) -> Iterator[tuple[str, Backwards]]:
    """Yield the tables of a component: first the one whose files ComfyUI is known to read."""
    named = family.kohya_names(component)
    if named is not None:
        yield named[0], Backwards(named[1])
    first = family.denoisers[0] if component in family.denoisers else component
    for layout in family.layouts:
        if layout.component == first:
            yield DENOISER_PREFIX, Backwards(layout)


def _candidates(
    entry: Entry, tables: Sequence[tuple[str, Backwards]], keys: Mapping[str, Any]
) -> Iterator[_Found]:
    of_layer = entry.parameter in _LAYER_PARAMETERS
    name = entry.module if of_layer else f"{entry.module}.{entry.parameter}".removeprefix(".")
    for prefix, table in tables:
        home = table.home(name)
        if home is None:
            continue
        full = DENOISER + home.module
        names = [full]
        if of_layer:
            names = [prefix + home.module.replace(".", "_"), f"{full}.{_SCALE}"]
        key = next((key for name in names if isinstance(key := keys.get(name), str)), "")
        if not key.startswith(DENOISER):
            continue
        module, _, parameter = key.removeprefix(DENOISER).rpartition(".")
        if of_layer and parameter != _SCALE:
            parameter = entry.parameter
        yield _Found(entry, home, module, parameter)


def _grouped(denoiser: nn.Module, found: Sequence[_Found]) -> list[Place]:
    """Return the layers by the parameter that they change, with their rows of it."""
    by_parameter: dict[tuple[str, str], list[_Found]] = {}
    for each in found:
        by_parameter.setdefault((each.module, each.parameter), []).append(each)
    places, issues = [], []
    for (module, parameter), parts in sorted(by_parameter.items()):
        owner = denoiser.get_submodule(module)
        shape = _shape(owner, parameter, parts[0].entry)
        inner = math.prod(_shape(owner, "weight", parts[0].entry)[1:])
        layers = []
        for part in parts:
            try:
                layers.append((part.entry, _rows(part, shape, inner)))
            except ValueError as error:
                issues.append(f"{shown(part.entry.layer)}: {error}")
        places.append(Place(module, parameter, shape, tuple(layers)))
    if issues:
        raise IncompatibleModelError(
            f"{len(issues)} layers of the artifact have another shape in this model; nothing was "
            "changed. Load the model that it was compiled for.",
            issues,
        )
    return places


def _shape(module: Any, parameter: str, entry: Entry) -> tuple[int, ...]:
    """Return a parameter's shape in the model, as it is before it is quantised."""
    if parameter == "weight" and isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    found = getattr(module, parameter, None)
    return entry.shape if found is None else tuple(found.shape)


def _rows(part: _Found, shape: tuple[int, ...], inner: int) -> Rows:
    """Return the rows of a parameter that a layer changes; None for all.

    Args:
        shape: the parameter's.
        inner: columns of its module's weight.

    Raises:
        ValueError: the rows cannot be split so, or the layer has another shape.
    """
    row, own = part.home.row, part.entry.shape
    rows = None
    if row.split is not None:
        rows = row.placements(part.home.numbers, shape[0], inner)[part.home.index].rows
    expected = shape if rows is None else (sum(map(len, rows)), *shape[1:])
    if _core(own) != _core(expected):
        raise ValueError(f"has shape {list(own)}, and {part.module} expects {list(expected)}")
    return rows


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without trailing ones: a 1x1 convolution is a linear layer."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
