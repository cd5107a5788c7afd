"""The live parameters of a model that a fusion's layers change; all of them are checked here.

:func:`find_targets` checks every layer before anything changes and reports all problems in one
error. `hindrances` checks whether a *mode* can act on the layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version

from klora_runtime.artifact.delta import LowRank
from klora_runtime.artifact.dtypes import REAL
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.tensor_file import torch_dtype
from klora_runtime.errors import ConfigError, IncompatibleModelError, shown
from klora_runtime.layers.additions import kind_of
from klora_runtime.layers.host import PLAIN, Host
from klora_runtime.layers.packed import is_packed_linear, parameter_of

#: Modules that can have a low-rank delta; any module with the parameter can have a dense one.
_MODULE_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)

#: Torch's dtypes of :data:`~klora_runtime.artifact.dtypes.REAL`.
REAL_DTYPES = tuple(map(torch_dtype, REAL))


@dataclass(frozen=True)
class Target:
    """One layer of a fusion and the live parameter that it changes."""

    entry: Entry
    module: nn.Module
    path: str
    """Name of the parameter in this model: component, module path if any, parameter."""
    lineage: tuple[nn.Module, ...]
    """The component, every module between, and the module itself."""
    host: Host = PLAIN
    """The host of the program that the module is part of."""

    @property
    def model(self) -> nn.Module:
        """The component that the module is part of."""
        return self.lineage[0]

    @cached_property
    def layer(self) -> str:
        """The path without ``weight``, for messages."""
        return self.path.removesuffix(".weight")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The module's path inside its component, one name for each step of the lineage."""
        _, *names = self.path.removesuffix(f".{self.entry.parameter}").split(".")
        return tuple(names)

    @cached_property
    def steps(self) -> tuple[tuple[nn.Module, str, nn.Module], ...]:
        """The path through the component as (module, name in it, module of that name)."""
        return tuple(zip(self.lineage, self.names, self.lineage[1:], strict=False))

    @property
    def parameter(self) -> torch.Tensor:
        """The present parameter; offloading and ``.to()`` may have moved or replaced it."""
        parameter = parameter_of(self.module, self.entry.parameter)
        assert parameter is not None
        return parameter

    @cached_property
    def is_written(self) -> bool:
        """Whether mode branch writes the parameter in place: no branch can add its delta."""
        return self.entry.parameter != "weight" or kind_of(type(self.module)) is None

    @property
    def origin(self) -> torch.Tensor:
        """The tensor in which a write to the parameter lasts: its data, if nothing loads it."""
        found = None
        if self.is_written:
            found = self.host.origin(self.lineage, (*self.names, self.entry.parameter))
        return self.parameter.data if found is None else found

    def publish(self) -> None:
        """Let the parameter and graphs of autograd see what was written into :attr:`origin`."""
        parameter = self.parameter
        if self.is_written and parameter.device.type != "meta":
            origin = self.origin
            if origin.data_ptr() != parameter.data_ptr():  # it is loaded at this moment
                parameter.data.copy_(origin)
        increment_version(parameter)


def chosen_components(fusion: Fusion, components: Sequence[str] | None) -> tuple[str, ...]:
    """Return the components to change; all of the fusion's if ``components`` is None.

    Raises:
        ConfigError: the fusion has no layer in a requested component.
    """
    if components is None:
        return fusion.components
    if isinstance(components, str):
        raise ConfigError(f"components={components!r}: expected a list, [{components!r}].")
    unknown = sorted(set(components) - set(fusion.components))
    if unknown or not components:
        raise ConfigError(
            f"components={list(components)}: the fusion changes {', '.join(fusion.components)}"
            + (f", not {', '.join(unknown)}." if unknown else "; name at least one.")
        )
    return tuple(sorted(set(components)))


def find_targets(
    models: Mapping[str, nn.Module], fusion: Fusion, host: Host = PLAIN
) -> list[Target]:
    """Return the live parameter of every layer that acts, in the order of the fusion's entries.

    Args:
        models: component modules by name, for the names of :func:`chosen_components`.
        host: the host of these modules.

    Raises:
        IncompatibleModelError: a module or parameter is missing, has another shape or kind, or is
            hidden by a wrapper. ``issues`` lists every such layer.
    """
    entries = [entry for entry in fusion.entries if entry.acts and entry.component in models]
    targets, issues = [], []
    for entry in entries:
        found = _find(models[entry.component], entry, host)
        if isinstance(found, Target):
            targets.append(found)
        else:
            issues.append(found)
    if issues:
        rest = without_missing(models, fusion, host)[0]
        fits = all(
            isinstance(_find(models[e.component], e, host), Target)
            for e in rest.entries
            if e.acts and e.component in models
        )
        raise _misfit(fusion, models, entries, issues, rest_fits=fits)
    if not targets:
        raise IncompatibleModelError(
            "the fusion changes nothing: none of its layers ever acts. Compile it with "
            "weights other than 0."
        )
    return targets


def refuse(issues: Iterable[str], headline: str) -> None:
    """Raise one :class:`IncompatibleModelError` if there are issues."""
    listed = tuple(issues)
    if listed:
        raise IncompatibleModelError(headline, listed)


def without_missing(
    models: Mapping[str, nn.Module], fusion: Fusion, host: Host = PLAIN
) -> tuple[Fusion, tuple[str, ...]]:
    """Return a fusion without the layers that a model lacks, and the names of these layers.

    A component of which the model has no layer at all keeps its layers, so :func:`find_targets`
    refuses them.

    Args:
        models: see :func:`find_targets`.
        host: the host of these modules.
    """
    there: list[Entry] = []
    missing: dict[str, list[Entry]] = {}
    for entry in fusion.entries:
        model = models.get(entry.component) if entry.acts else None
        if model is not None and _lacks(model, entry, host):
            missing.setdefault(entry.component, []).append(entry)
        else:
            there.append(entry)
    known = {entry.component for entry in there if entry.acts}
    left = [entry for name, own in missing.items() if name in known for entry in own]
    if not left:
        return fusion, ()
    names = {entry.path for entry in left}
    kept = tuple(entry for entry in fusion.entries if entry.path not in names)
    return replace(fusion, entries=kept), tuple(entry.layer for entry in left)


def _lacks(model: nn.Module, entry: Entry, host: Host) -> bool:
    """Return whether a model has no such module, or its module no such parameter.

    A module may hold its weight under another name or compute it; it does not lack that.
    """
    _, lineage = _located(model, entry, host)
    if lineage is None:
        return True
    module, name = lineage[-1], entry.parameter
    if parameter_of(module, name) is not None or (name == "weight" and not hasattr(module, name)):
        return False
    return getattr(module, name, None) is None


def _located(
    model: nn.Module, entry: Entry, host: Host
) -> tuple[str, tuple[nn.Module, ...] | None]:
    """Return the path of an entry's module and its lineage; None if there is no such module."""
    found = ((path, _lineage(model, path)) for path in host.paths(entry.module))
    return next((each for each in found if each[1] is not None), ("", None))


def _find(model: nn.Module, entry: Entry, host: Host) -> Target | str:
    path, lineage = _located(model, entry, host)
    if lineage is None:
        return f"{entry.layer}: there is no such module"
    module = lineage[-1]
    name = ".".join(filter(None, (entry.component, path)))
    problem = (
        _check_type(module, entry)
        or _check_parameter(module, entry)
        or (path and host.unused(lineage, path.rpartition(".")[2]))
    )
    if problem:
        return f"{name}: {problem}"
    return Target(entry, module, f"{name}.{entry.parameter}", lineage, host)


def _lineage(model: nn.Module, path: str) -> tuple[nn.Module, ...] | None:
    """Return the model and every module on the way to a path; None if there is no such path."""
    lineage = [model]
    for name in filter(None, path.split(".")):
        found = lineage[-1]._modules.get(name)
        if found is None:  # a wrapper (torch.compile) forwards attributes
            found = getattr(lineage[-1], name, None)
        if not isinstance(found, nn.Module):
            return None
        lineage.append(found)
    return tuple(lineage)


def _check_type(module: nn.Module, entry: Entry) -> str | None:
    low_rank = any(isinstance(stored.delta, LowRank) for stored in entry.acting.values())
    if not low_rank or isinstance(module, _MODULE_TYPES) or is_packed_linear(type(module)):
        return None
    known = ", ".join(kind.__name__ for kind in _MODULE_TYPES)
    return f"is a {type(module).__name__}, expected one of {known}"


def _check_parameter(module: nn.Module, entry: Entry) -> str | None:
    parameter = parameter_of(module, entry.parameter)
    if parameter is None:
        return f"has no parameter {entry.parameter}"
    found = _unpacked_shape(module, parameter)
    if _core(entry.shape) != _core(found):
        return f"{entry.parameter} has shape {list(found)}, expected {list(entry.shape)}"
    return None


def _unpacked_shape(module: Any, parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the logical shape of a parameter; quantised ones are packed into another shape."""
    packed = type(parameter) is not nn.Parameter or parameter.dtype not in REAL_DTYPES
    of_kind: tuple[int, ...] | None = None
    if isinstance(module, nn.Linear) or is_packed_linear(type(module)):
        of_kind = module.out_features, module.in_features
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        inner = module.in_channels // module.groups
        of_kind = module.out_channels, inner, *module.kernel_size
    if packed and of_kind is not None and parameter is parameter_of(module, "weight"):
        return of_kind
    return tuple(parameter.shape)


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without trailing ones: a 1x1 convolution is a linear layer."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _misfit(
    fusion: Fusion,
    models: Mapping[str, nn.Module],
    entries: list[Entry],
    issues: list[str],
    *,
    rest_fits: bool,
) -> IncompatibleModelError:
    # Importing all records is slow, and only this error needs them.
    from klora_runtime.families.catalogue import families_name, families_of

    classes = ", ".join(sorted(type(model).__name__ for model in models.values()))
    shapes = {
        (component, path): tuple(module.weight.shape)
        for component, model in models.items()
        for path, module in model.named_modules()
        if isinstance(module, _MODULE_TYPES)
        and isinstance(getattr(module, "weight", None), torch.Tensor)
    }
    found, wanted = families_of(shapes), fusion.candidates
    families = ""
    if found and wanted and found.isdisjoint(wanted):
        families = (
            f" It was compiled for {families_name(wanted)}, this is {families_name(found)}: load a "
            "matching model, or compile LoRAs of this one."
        )
    if len(issues) == len(entries):
        headline = f"no layer of the fusion fits {shown(classes)}"
    else:
        headline = (
            f"{len(issues)} of {len(entries)} layers of the fusion do not fit {shown(classes)}"
        )
    skip = (
        ' To apply the others, add missing="skip" (klora sample: --missing skip).'
        if rest_fits
        else ""
    )
    return IncompatibleModelError(f"{headline}; nothing was changed.{families}{skip}", issues)
