"""Applying a fusion to a diffusers pipeline, and the handle that changes or undoes it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn

from klora_runtime.artifact.beside import beside
from klora_runtime.artifact.file import load_fusion
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.references import complete
from klora_runtime.artifact.schedule import summary
from klora_runtime.errors import ConfigError, InUseError
from klora_runtime.layers.choice import MODES, choose
from klora_runtime.layers.live_fusion import LiveFusion, checked_weights
from klora_runtime.layers.rounding import rounding_share
from klora_runtime.pipeline.attachment import MISSING, Attachment, fit
from klora_runtime.pipeline.base_files import Base, refuse_base
from klora_runtime.pipeline.report import Report, place_text


def apply_fusion(
    pipe: Any,
    path_or_fusion: str | os.PathLike[str] | Fusion,
    mode: str = "auto",
    *,
    components: Sequence[str] | None = None,
    weights: Mapping[str, float] | None = None,
    always: Mapping[str, str | os.PathLike[str] | Fusion] | None = None,
    missing: Literal["error", "skip"] = "error",
    sources: Mapping[str, str | os.PathLike[str]] | None = None,
    device: str | torch.device | None = None,
    weight_name: str | None = None,
    signed_by: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
) -> FusionHandle:
    """Apply a fusion to a diffusers pipeline, which stays an ordinary pipeline.

    Args:
        pipe: any diffusers pipeline with a scheduler.
        path_or_fusion: an artifact file or its name on the Hugging Face Hub, see
            :func:`load_fusion`; or a loaded or compiled fusion.
        mode: ``merge`` writes base + delta into the live weights at each switch and costs nothing
            per step. ``branch`` leaves the weights of layers untouched and adds each delta's
            output to the layer's output, for weights that are quantised, offloaded, or too coarse
            to hold the delta; it writes biases, norms and other small parameters. ``auto``
            chooses; ``.report()`` says which mode and why.
        components: pipeline components to change; all of the fusion's by default.
        weights: slot name -> factor on its deltas, -100 to 100, on top of the fusion's
            coefficients; 1 by default.
        always: name -> an artifact or fusion of one LoRA that acts beside this one, in all its
            layers at every step, such as ``{"turbo": "turbo.klora.safetensors"}``. It becomes a
            slot of that name and stays through :meth:`FusionHandle.swap`.
        missing: what to do with layers that the model lacks, such as those of a LoRA for another
            version of it: ``error`` refuses the fusion, ``skip`` applies the others, and the
            report's ``missing`` names what was left out.
        sources: for a thin artifact, the LoRA files that it was compiled from:
            ``{"content": "fox.safetensors", "style": "ink.safetensors"}``.
        device: where the factors of a path are kept, see :func:`load_fusion`; host memory by
            default. Leave it out if the fusion is loaded.
        weight_name: the file in a repository of the Hub that has several artifacts.
        signed_by: the key that every file of this call must be signed by, see
            :func:`load_fusion`. Leave it out if the fusion is loaded.
        base: for mode merge, the folder or safetensors file that the pipeline was loaded from, or
            ``auto`` for where it says that it was. Base values are then read back from there at
            each write, and not copied to memory. A weight that differs from the file keeps its
            copy, as does each where the system cannot keep others from writing to the file: the
            report's ``copied`` says which, and why. It needs Linux, and files of your own.

    Returns:
        The handle, to remove, swap, set, enable and report. It is also a context manager.

    Raises:
        ArtifactError: the file breaks the format, a source is missing or is another file, or a file
            is not signed as ``signed_by`` asks; nothing was changed.
        ConfigError: an unknown mode, component, slot, source or device, a weight out of range, a
            ``base`` that is not there, or something of ``always`` that is not one LoRA at constant
            weight.
        IncompatibleModelError: the fusion does not fit the pipeline, or its layers' dtype cannot
            hold it; nothing was changed.
        InUseError: the pipeline already carries a fusion, whose handle is the error's ``handle``.
        KloraError: the Hub does not give a file.
    """
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r}: expected one of {', '.join(MODES)}.")
    refuse_base(base)
    if missing not in MISSING:
        raise ConfigError(f"missing={missing!r}: expected {' or '.join(MISSING)}.")
    fusion = _loaded(path_or_fusion, sources, device, weight_name, signed_by)
    others = {
        name: each
        if isinstance(each, Fusion)
        else load_fusion(each, device=_place(device), signed_by=signed_by)
        for name, each in _mapping("always", always).items()
    }
    factors = {} if weights is None else weights
    skip = missing == "skip"
    return FusionHandle(
        pipe, fusion, mode, components, factors, others, skip_missing=skip, base=base
    )


class FusionHandle:
    """The handle of a fusion on a pipeline, from :func:`apply_fusion`; also a context manager."""

    def __init__(
        self,
        pipe: Any,
        fusion: Fusion,
        mode: str,
        components: Sequence[str] | None,
        weights: Mapping[str, float],
        always: Mapping[str, Fusion],
        *,
        skip_missing: bool,
        base: Base = None,
    ) -> None:
        self._given, self._always = fusion, always
        whole = beside(fusion, always)
        factors = checked_weights(whole, weights)
        found = fit(pipe, whole, components, owner=self, skip_missing=skip_missing, base=base)
        self._missing = found.missing
        chosen, self._why = choose(mode, found.layers, factors)
        self._live = LiveFusion(found.fusion, chosen, factors)
        self._attachment = Attachment(
            pipe, self._live, components, owner=self, skip_missing=skip_missing, base=base
        )
        try:
            self._attachment.take_hold(found.fusion)
            self._live.write()
        except BaseException:
            self._let_go()
            raise

    def __enter__(self) -> FusionHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    @property
    def fusion(self) -> Fusion:
        """The fusion that is applied, or was applied last, as it was given: without ``always``."""
        return self._given

    @property
    def mode(self) -> str:
        """How the fusion acts, or acted last: ``merge`` or ``branch``."""
        return self._live.mode.name

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The component modules that carry the fusion; empty after :meth:`remove`."""
        return self._attachment.models

    def remove(self) -> None:
        """Restore every parameter to the bit and take everything off the pipeline.

        A second call does nothing.

        Raises:
            InUseError: another thread is generating, or a layer is out of reach; the fusion is
                still applied.
        """
        if self._is_applied:
            with self._attachment.change():
                self._let_go()

    def swap(
        self,
        path_or_fusion: str | os.PathLike[str] | Fusion,
        *,
        sources: Mapping[str, str | os.PathLike[str]] | None = None,
        device: str | torch.device | None = None,
        weight_name: str | None = None,
        signed_by: str | os.PathLike[str] | None = None,
    ) -> None:
        """Replace the fusion by another one; weights of slots with the same name stay.

        What ``always`` named acts beside the new fusion too.

        If this raises, the old fusion is still applied.

        Args:
            path_or_fusion: the new fusion; see :func:`apply_fusion`.
            sources: see :func:`apply_fusion`.
            device: see :func:`apply_fusion`.
            weight_name: see :func:`apply_fusion`.
            signed_by: see :func:`apply_fusion`.

        Raises:
            ArtifactError: see :func:`apply_fusion`.
            ConfigError: see :func:`apply_fusion`.
            IncompatibleModelError: the new fusion does not fit the pipeline or the present mode, or
                the layers' dtype cannot hold it.
            InUseError: another thread is generating, a layer is out of reach, or this fusion was
                removed.
            KloraError: the Hub does not give a file.
        """
        self._require_applied()
        fusion = _loaded(path_or_fusion, sources, device, weight_name, signed_by)
        whole = beside(fusion, self._always)
        with self._attachment.change():
            found = self._attachment.fit(whole)
            try:
                self._attachment.take_hold(found.fusion)
                self._live.swap(found.fusion, found.layers)
            except BaseException:
                self._attachment.take_hold(self._live.fusion)
                raise
        self._given, self._missing = fusion, found.missing
        self._why = "a swap keeps the mode"

    def set(self, weights: Mapping[str, float] | None = None, /, **named: float) -> None:
        """Change how strongly slots act: ``handle.set(content=0.8)``. Other slots stay.

        Args:
            weights: slot name -> factor, -100 to 100; for slot names that are not valid keywords.
            named: the same as keyword arguments.

        Raises:
            ConfigError: an unknown slot or a factor out of range; nothing was changed.
            IncompatibleModelError: layers would hold infinity; nothing was changed.
            InUseError: another thread is generating, or the fusion was removed.
        """
        self._require_applied()
        given = {} if weights is None else weights
        changed = checked_weights(self._live.fusion, given) | checked_weights(
            self._live.fusion, named
        )
        with self._attachment.change():
            self._live.set_weights(changed)

    @property
    def enabled(self) -> bool:
        """Whether the fusion acts. Set False for the bare model, to the bit; True to act again.

        Raises:
            ConfigError: neither True nor False was assigned.
            InUseError: another thread is generating, or the fusion was removed.
        """
        return self._live.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._require_applied()
        if not isinstance(value, bool):
            raise ConfigError(f"enabled={value!r}: expected True or False.")
        with self._attachment.change():
            self._live.enable(value)

    def report(self) -> Report:
        """Return mode, layers, rounding and memory; measuring the rounding takes a while.

        Raises:
            InUseError: the fusion was removed.
        """
        self._require_applied()
        live = self._live
        roundings = list(live.mode.rounding(live.weights))
        worst = max(roundings, key=lambda each: each.share)
        return Report(
            mode=live.mode.name,
            why=self._why,
            layers=dict(Counter(entry.fate for entry in self._acting())),
            missing=self._missing,
            components=self._attachment.components,
            switches=live.mode.switches,
            weights={slot: live.weights.get(slot, 1.0) for slot in live.fusion.slots},
            enabled=live.enabled,
            progress=self._attachment.progress,
            clock=self.fusion.clock,
            rounding=rounding_share(roundings),
            worst_rounding=(worst.layer, worst.share),
            nbytes=live.mode.nbytes(),
            copied=dict(live.mode.copied()),
        )

    def __repr__(self) -> str:
        """Return three lines: what the fusion is, its size, and what acts now."""
        what, how_large, _ = summary(self._live.fusion)
        pipe, live = self._attachment.pipe, self._live
        if pipe is None:
            return f"FusionHandle, removed: {what}\n{how_large}\nnothing acts"
        acting = self._acting()
        kept = sum(live.mode.nbytes().values()) / 1e6
        return (
            f"FusionHandle on {type(pipe).__name__}: {what}\n"
            f"{len(acting)} layers in {', '.join(self._attachment.components)}; "
            f"mode {live.mode.name}, {live.mode.switches} switches a run, {kept:.2f} MB kept\n"
            + (self._acting_now(acting) if live.enabled else "disabled: the bare model acts")
        )

    def _repr_html_(self) -> str:
        """Return the three lines and a map of the schedule as it acts here, for notebooks."""
        from klora_runtime.artifact.schedule_html import schedule_html

        if not self._is_applied:
            return schedule_html(self._live.fusion, repr(self))
        held = replace(self._live.fusion, entries=tuple(self._acting()))
        return schedule_html(held, repr(self), self._live.weights, self._attachment.progress)

    def _acting(self) -> list[Entry]:
        """Return the layers that are applied."""
        components = self._attachment.components
        return [e for e in self._live.fusion.entries if e.acts and e.component in components]

    def _acting_now(self, acting: Sequence[Entry]) -> str:
        progress, weights = self._attachment.progress, self._live.weights
        rows = [entry.timeline.at(progress or 0.0) for entry in acting]
        counts = {slot: sum(1 for row in rows if row.get(slot)) for slot in self._live.fusion.slots}
        parts = (
            f"{slot} in {count} layers, weight {weights.get(slot, 1.0):g}"
            for slot, count in counts.items()
        )
        place = "before the first step"
        if progress is not None:
            place = place_text(self.fusion.clock, progress)
        return f"acting {place}: {'; '.join(parts)}"

    @property
    def _is_applied(self) -> bool:
        return self._attachment.pipe is not None

    def _require_applied(self) -> None:
        if not self._is_applied:
            raise InUseError("this fusion was removed from its pipeline; apply it again.")

    def _let_go(self) -> None:
        """Undo everything, even if taking hold failed half-way."""
        self._live.release()
        self._attachment.let_go()


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    """Return an optional argument that maps names, empty if it is None."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}={value!r}: expected names with an artifact each.")
    return value


def _place(device: str | torch.device | None) -> str | torch.device:
    """Return where the factors of a file are kept; host memory by default."""
    return "cpu" if device is None else device


def _loaded(
    path_or_fusion: str | os.PathLike[str] | Fusion,
    sources: Mapping[str, str | os.PathLike[str]] | None,
    device: str | torch.device | None,
    weight_name: str | None,
    signed_by: str | os.PathLike[str] | None,
) -> Fusion:
    if not isinstance(path_or_fusion, Fusion):
        read = load_fusion(
            path_or_fusion,
            device=_place(device),
            sources=sources,
            weight_name=weight_name,
            signed_by=signed_by,
        )
        return complete(read)
    if weight_name is not None:
        raise ConfigError(
            f"weight_name={weight_name!r} is for a name on the Hub, and this fusion is loaded "
            "already; leave it out."
        )
    if device is not None:
        raise _for_a_path("device", device)
    if signed_by is not None:
        raise _for_a_path("signed_by", signed_by)
    return complete(path_or_fusion, sources)


def _for_a_path(name: str, value: object) -> ConfigError:
    return ConfigError(
        f"{name}={str(value)!r} is for a path, and this fusion is loaded already; leave it out, or "
        f"load the file with load_fusion(path, {name}=...)."
    )
