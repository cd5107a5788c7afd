"""A whole run of ``klora sample``, ordered so that problems are found before the sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from klora_compile.sampling.album import check_ending, write_shots
from klora_compile.sampling.making import Making, refuse_others
from klora_compile.sampling.pictures import Request, Shot, makes_videos, sample
from klora_compile.sampling.pipeline import compile_denoiser, load_pipeline, use_scheduler
from klora_compile.sampling.stating import making_of
from klora_runtime.artifact.digests import file_digest
from klora_runtime.artifact.file import load_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.artifact.references import complete
from klora_runtime.errors import IncompatibleModelError, KloraError, shown
from klora_runtime.families.catalogue import families_name
from klora_runtime.hub.fetching import kept_name
from klora_runtime.pipeline.handle import apply_fusion


@dataclass(frozen=True)
class How:
    """The options of ``klora sample`` that say how to sample."""

    scheduler: str | None = None
    mode: str = "auto"
    weights: Mapping[str, float] = field(default_factory=dict)
    compiled: bool = False
    device: str = "auto"
    dtype: str = "auto"
    sources: Mapping[str, Path] = field(default_factory=dict)
    """LoRA files of a thin artifact by name."""
    always: Mapping[str, str | Path] = field(default_factory=dict)
    """Artifacts of LoRAs that act beside the fusion, by name."""
    missing: Literal["error", "skip"] = "error"
    """What to do with layers that the model lacks."""
    signed_by: Path | None = None
    """The key that every artifact must be signed by; None for any."""
    trust_remote_code: bool = False
    """Whether Python files of the model itself may run."""
    tells: bool = True
    """Whether a PNG says how it was made."""
    again: Making | None = None
    """The making that the new one must agree with; None for any."""
    overwrite: bool = False
    """Whether to replace an existing picture."""


@dataclass(frozen=True)
class Made:
    """The written file, the mode, and the speed."""

    output: Path
    model: str
    """Name of the model, with its commit if it is from the Hub."""
    holds: str
    """A short description of the file's contents."""
    shots: Sequence[Shot]
    mode: str
    why: str
    """Why that mode was chosen."""
    missing: tuple[str, ...] = ()
    """Layers that were left out because the model lacks them."""

    def text(self) -> str:
        """Return a line or two for people."""
        wrote = f"wrote {shown(self.output)}: {self.holds}"
        text = f"{wrote}; mode {self.mode}: {self.why}; {_pace(self.shots)}"
        if self.missing:
            first = shown(self.missing[0])
            text += f"\nleft out {len(self.missing)} layers that the model lacks (first: {first})"
        return text

    def json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "output": str(self.output),
            "model": self.model,
            "mode": self.mode,
            "why": self.why,
            "missing": list(self.missing),
            "pictures": [
                {
                    "prompt": shot.prompt,
                    "seed": shot.seed,
                    "seconds": shot.seconds,
                    "frames": len(shot.frames),
                }
                for shot in self.shots
            ],
        }


def sample_to_file(file: Path, model: str, request: Request, output: Path, how: How) -> Made:
    """Apply the artifact ``file`` to ``model``, make the pictures, and write them to ``output``.

    Raises:
        KloraError: a step failed; ``output`` is unchanged.
    """
    check_ending(output, total=request.total, videos=True)
    fusion = complete(load_fusion(file, signed_by=how.signed_by), how.sources)
    always = {n: load_fusion(path, signed_by=how.signed_by) for n, path in how.always.items()}
    pipe = load_pipeline(
        *(model, fusion.components),
        device=how.device,
        dtype=how.dtype,
        trust_remote_code=how.trust_remote_code,
    )
    if how.scheduler is not None:
        use_scheduler(pipe, how.scheduler)
    made = making(file, pipe, fusion, request, how)
    if how.again is not None:
        refuse_others(how.again, made)
    check_ending(output, total=request.total, videos=makes_videos(pipe))
    try:
        handle = apply_fusion(
            pipe,
            fusion,
            mode=how.mode,
            weights=how.weights,
            always=always,
            missing=how.missing,
        )
    except IncompatibleModelError as error:
        raise _misfit(error, file, fusion, model) from error
    with handle:
        if how.compiled:
            compile_denoiser(pipe, fusion)
        shots = list(sample(pipe, request))
        report = handle.report()
    held = write_shots(shots, output, made if how.tells else None, overwrite=how.overwrite)
    return Made(output, made.model, held, shots, report.mode, report.why, report.missing)


def making(file: Path, pipe: Any, fusion: Fusion, request: Request, how: How) -> Making:
    """Return how pictures are about to be made; see :func:`making_of`."""
    return making_of(
        pipe,
        fusion,
        request,
        artifact=_named(file),
        always={name: _named(Path(path)) for name, path in how.always.items()},
        files=how.sources,
        scheduler=how.scheduler,
        mode=how.mode,
        weights=how.weights,
        missing=how.missing,
        dtype=how.dtype,
    )


def _named(artifact: Path) -> dict[str, str]:
    """Return the name and the digest of an artifact, and its name on the Hub if it has one."""
    named = {"file": artifact.name, "sha256": file_digest(artifact)}
    hub = kept_name(artifact)
    return named if hub is None else {**named, "hub": hub}


def _misfit(error: KloraError, file: Path, fusion: Fusion, model: str) -> IncompatibleModelError:
    family = f" (for {families_name(fusion.candidates)})" if fusion.candidates else ""
    named = IncompatibleModelError(
        f"{shown(file)}{family} cannot be applied to {shown(model)}: {error}"
    )
    named.issues = error.issues
    return named


def _pace(shots: Sequence[Shot]) -> str:
    """Return seconds per picture, with the first one, which warms up, listed separately."""
    first, *rest = (shot.seconds for shot in shots)
    what = "video" if shots[0].is_video else "picture"
    if not rest:
        return f"{first:.2f} s per {what}"
    return f"{sum(rest) / len(rest):.2f} s per {what}, the first {first:.2f} s"
