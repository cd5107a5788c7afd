"""Reasons why a mode cannot act on a layer, checked at first and again before each run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from klora_runtime.errors import InUseError
from klora_runtime.layers.execution import COMPUTE_DTYPES, has_memory
from klora_runtime.layers.leaf import misled
from klora_runtime.layers.module_tree import uses_of
from klora_runtime.layers.packed import parameter_of
from klora_runtime.layers.quantisers import quantiser_of
from klora_runtime.layers.targets import Target


def recheck(targets: Iterable[Target], hindrance: Callable[[Target], str | None]) -> None:
    """Check that no layer has become unusable since the fusion was applied.

    Args:
        hindrance: returns why a mode cannot act on a target, or None.

    Raises:
        InUseError: a layer was wrapped, replaced, fused or moved out of reach; nothing was changed.
    """
    issues = []
    for target in targets:
        problem = _displaced(target) or hindrance(target)
        if problem is not None:
            issues.append(f"{target.layer}: {problem}")
    if issues:
        raise InUseError(
            f"{len(issues)} layers were changed by something else since the fusion was "
            "applied. Undo those changes first; until then the fusion can be neither used nor "
            "removed.",
            issues,
        )


def merge_hindrances(targets: Sequence[Target]) -> Iterator[str]:
    """Yield why targets cannot be merged into, one sentence each."""
    if not targets:
        return
    models = {id(target.model): target.model for target in targets}.values()
    host = targets[0].host
    owners = Counter(
        _storage(parameter if parameter.device.type != "meta" else host.origin([module], [name]))
        for model in models
        for module in uses_of(model)
        for name, parameter in module._parameters.items()
        if parameter is not None
    )
    for target in targets:
        problem = merge_hindrance(target)
        if problem is None and owners[_storage(target.origin)] > 1:
            problem = f"it shares its {target.entry.parameter}'s memory with another layer"
        if problem is not None:
            yield f"{target.layer}: {problem}"


def merge_hindrance(target: Target) -> str | None:
    """Return why one target cannot be written, or None; cheap enough for every run."""
    parameter, its = target.parameter, f"its {target.entry.parameter}"
    if type(parameter.data) is not torch.Tensor:
        return f"{its} is a {type(parameter.data).__name__}, not a plain tensor"
    if parameter.dtype not in COMPUTE_DTYPES:
        return f"{its} is {parameter.dtype}{_reason(target)}"
    if type(parameter) is not torch.nn.Parameter:
        return f"{its} is a {type(parameter).__name__}, not a plain parameter"
    quantiser = quantiser_of(target.module)
    if quantiser is not None and target.entry.parameter == "weight":
        return f"{quantiser} quantises its weight at each forward, so a merged delta would be lost"
    names = (*target.names, target.entry.parameter)
    unwritable = target.host.unwritable(target.lineage, names, small=target.is_written)
    if unwritable is not None:
        return unwritable
    origin = target.origin
    if origin.device.type == "meta":
        return f"{its} has no memory (meta device)"
    if origin.dtype not in COMPUTE_DTYPES:
        return f"{its} is kept as {origin.dtype}"
    if origin.layout is not torch.strided or not _dense(origin):
        return f"{its} is not a dense strided tensor"
    return None


def branch_hindrances(targets: Sequence[Target]) -> Iterator[str]:
    """Yield why targets cannot be branched, one sentence each."""
    yield from merge_hindrances([target for target in targets if target.is_written])
    leaves = [target for target in targets if not target.is_written]
    problems = [(target, branch_hindrance(target)) for target in leaves]
    uses = Counter(id(target.module) for target, problem in problems if problem is None)
    for target, problem in problems:
        if problem is None and uses[id(target.module)] > 1:
            problem = "the fusion changes its module more than once"
        if problem is not None:
            yield f"{target.layer}: {problem}"


def branch_hindrance(target: Target) -> str | None:
    """Return why one leaf cannot be branched, or None; cheap enough for every run."""
    module = target.module
    if vars(module).get("max_norm") is not None:  # a failing getattr of a module is slow
        return "it is an embedding with max_norm, which only mode merge can change"
    read = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    if (
        read
        or isinstance(target.lineage[-2], nn.TransformerEncoderLayer)
        or target.host.reads_weight(target.lineage, target.names[-1])
    ):
        return "its parent module reads the weight directly, so a branch on it would be skipped"
    if not has_memory(target):
        return "its weight has no memory (meta device), and nothing loads it"
    replaced = misled(module)
    if replaced is not None:
        return (
            f"its forward was replaced on the instance ({replaced}), so a branch on it might be "
            "skipped; undo that, or apply the fusion first"
        )
    return None


def _reason(target: Target) -> str:
    """Return the cause of a weight's dtype in a few words, if it is known."""
    casting = target.host.casting(target.module)
    if casting is not None:
        return f", by {casting.name}"
    kind = type(target.module).__name__
    return "" if kind in ("Linear", "Conv1d", "Conv2d", "Conv3d") else f", of a {kind}"


def _storage(tensor: torch.Tensor | None) -> int:
    """Return a number that tensors in the same memory have in common."""
    if tensor is None or type(tensor.data) is not torch.Tensor or tensor.device.type == "meta":
        return id(tensor)
    return tensor.untyped_storage().data_ptr()


def _dense(tensor: torch.Tensor) -> bool:
    """Return whether no two elements share memory and there are no gaps."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(
        (stride, size)
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        if size > 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def _displaced(target: Target) -> str | None:
    """Return why a module is no longer in place or in use; None if it is."""
    for parent, name, child in target.steps:
        if parent._modules.get(name) is not child:
            if not _leads_to(target):
                return "was replaced or wrapped"
            break
    if parameter_of(target.module, target.entry.parameter) is None:
        return f"has no parameter {target.entry.parameter} any more"
    return target.host.unused(target.lineage, target.names[-1]) if target.names else None


def _leads_to(target: Target) -> bool:
    """Return whether a module is still in place; torch.compile may have wrapped a parent."""
    found: Any = target.model
    for name in target.names:
        found = getattr(found, name, None)
    return found is target.module
