"""How pictures were made: text in a PNG that people's tools read, and that klora repeats.

``parameters`` holds the text that A1111 writes and reads, and from which ComfyUI makes a workflow.
``klora_making`` holds the same as JSON, with what only klora knows. Neither holds a path or a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from klora_runtime import __version__
from klora_runtime.artifact.canonical import canonical_json, parse_json
from klora_runtime.errors import ConfigError, KloraError, shown

#: Names of the text chunks.
PARAMETERS, OWN = "parameters", "klora_making"

#: A scheduler of diffusers, without ``Scheduler`` -> A1111's name of that sampler.
_SAMPLERS = {
    "DDIM": "DDIM",
    "DPMSolverMultistep": "DPM++ 2M",
    "DPMSolverSDE": "DPM++ SDE",
    "EulerAncestralDiscrete": "Euler a",
    "EulerDiscrete": "Euler",
    "FlowMatchEulerDiscrete": "Euler",
    "HeunDiscrete": "Heun",
    "KDPM2Discrete": "DPM2",
    "LCM": "LCM",
    "LMSDiscrete": "LMS",
    "PNDM": "PLMS",
    "UniPCMultistep": "UniPC",
}
_AUTOV2, _AUTOV3 = 10, 12

#: Fact of a making -> argument of a pipeline's call; ``sampler`` is the scheduler.
FACTS: Mapping[str, str | None] = {
    "sampler": None,
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "width": "width",
    "height": "height",
}


@dataclass(frozen=True)
class Making:
    """Everything that a picture, or a sheet of pictures, was made with."""

    artifact: Mapping[str, str]
    """``file`` (name), ``sha256``, and ``hub``, its name and commit on the Hub; empty if the fusion
        was never written to a file."""
    always: Mapping[str, Mapping[str, str]]
    """The same of artifacts beside it, by name."""
    loras: Mapping[str, Mapping[str, str]]
    """Source -> ``file``, ``sha256``, ``autov2``, and ``autov3`` if the file was at hand."""
    model: str
    """Name of the base model; see :func:`~klora_compile.base_models.model_name`."""
    prompts: tuple[str, ...]
    seed: int
    count: int
    settings: Mapping[str, Any]
    """Arguments of the pipeline's call that were given."""
    scheduler: str | None
    """The scheduler that was asked for; None for the model's own."""
    mode: str
    weights: Mapping[str, float]
    missing: str
    dtype: str
    facts: Mapping[str, Any]
    """What was in effect, see :data:`FACTS`; None where it is unknown."""
    rule: str | None = None
    """The fusion's rule; None in pictures of an earlier klora."""
    rule_settings: Mapping[str, Any] = field(default_factory=dict)
    """The settings of that rule, and those of all rules, as an artifact states them."""

    def json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**asdict(self), "prompts": list(self.prompts), "version": __version__}

    def parameters(self) -> str:
        """Return A1111's text about the first picture."""
        lines = [self.prompts[0]]
        if negative := self.settings.get("negative_prompt"):
            lines.append(f"Negative prompt: {negative}")
        facts = self.facts
        size = f"{facts['width']}x{facts['height']}" if facts["width"] else None
        hashes = {
            Path(each["file"]).stem: each.get("autov3", each["autov2"])
            for each in self.loras.values()
        }
        values = {
            "Steps": facts["steps"],
            "Sampler": facts["sampler"],
            "CFG scale": facts["guidance"],
            "Seed": self.seed,
            "Size": size,
            "Model": self.model,
            "Lora hashes": ", ".join(f"{name}: {digest}" for name, digest in hashes.items()),
            "klora artifact": self.artifact.get("file"),
            "klora artifact hash": self.artifact.get("sha256", "")[:_AUTOV2],
            "klora rule": self.rule,
            "klora settings": _stated(self.rule_settings),
            "klora weights": ", ".join(f"{slot} {w:g}" for slot, w in self.weights.items()),
            "Version": f"klora {__version__}",
        }
        told = (f"{n}: {_quoted(value)}" for n, value in values.items() if value not in (None, ""))
        return "\n".join([*lines, ", ".join(told)])

    def chunks(self) -> PngInfo:
        """Return the text chunks of a PNG."""
        found = PngInfo()
        found.add_itxt(PARAMETERS, self.parameters())
        found.add_itxt(OWN, canonical_json(self.json()))
        return found


def sampler_name(scheduler: Any) -> str | None:
    """Return A1111's name of a pipeline's sampler, or the scheduler's own."""
    if scheduler is None:
        return None
    short = type(scheduler).__name__.removesuffix("Scheduler")
    return _SAMPLERS.get(short, short)


def lora_hashes(sha256: str, path: Path | None = None) -> dict[str, str]:
    """Return the hashes by which people look a LoRA up.

    Args:
        sha256: digest of its file; AutoV2 is its beginning.
        path: the file, for AutoV3: the digest of what follows a safetensors header.
    """
    found = {"autov2": sha256[:_AUTOV2]}
    if path is not None and path.suffix == ".safetensors":
        with path.open("rb") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            found["autov3"] = hashlib.file_digest(file, "sha256").hexdigest()[:_AUTOV3]
    return found


def read_making(path: Path) -> Making:
    """Return how a picture was made.

    Raises:
        ConfigError: it is no picture, holds no text of klora's, or another version's.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            text = getattr(picture, "text", {}).get(OWN)
    except (OSError, ValueError, SyntaxError) as error:
        raise ConfigError(f"{shown(path)} is no picture that can be read. Name a .png.") from error
    if text is None:
        raise ConfigError(
            f"{shown(path)} does not say how klora made it; klora sample writes that into a .png, "
            "unless --no-metadata is given."
        )
    try:
        return _checked(parse_json(str(text).encode()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{shown(path)}: what it says of its making is not valid. Get the picture again."
        ) from error


def refuse_others(then: Making, now: Making) -> None:
    """Refuse to repeat a picture with other artifacts.

    Raises:
        KloraError: a digest differs; ``issues`` lists them.
    """
    if not then.artifact:
        _refuse_other_fusion(then, now)
        return
    before = {"the artifact": then.artifact, **then.always}
    after = {"the artifact": now.artifact, **now.always}
    issues = [
        f"{shown(name)}: expected {shown(before[name]['file'])} with sha256 "
        f"{shown(before[name]['sha256'])}, found {after.get(name, {}).get('sha256', 'none')}"
        for name in before
        if after.get(name, {}).get("sha256") != before[name]["sha256"]
    ]
    if issues:
        raise KloraError("these are not the artifacts that the picture was made with:", issues)


def _refuse_other_fusion(then: Making, now: Making) -> None:
    """Refuse to repeat a picture without an artifact with a fusion of other LoRAs or settings."""
    before, after = _fusion(then), _fusion(now)
    issues = [
        f"{shown(name)}: expected {shown(before.get(name, 'none'))}, found "
        f"{shown(after.get(name, 'none'))}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    if issues:
        raise KloraError(
            "the artifact is not of the fusion that the picture was made with:", issues
        )


def _fusion(making: Making) -> dict[str, Any]:
    """Return everything that a fusion is compiled from, by name."""
    digests = {f"sha256 of {name}": each["sha256"] for name, each in making.loras.items()}
    return {"rule": making.rule, **making.rule_settings, **digests}


def _checked(found: Any) -> Making:
    """Return the making that JSON states, after checking all types that are used."""
    for name, kind in _TYPES.items():
        _require(isinstance(found[name], kind))
    artifacts = [each for each in (found["artifact"], *found["always"].values()) if each]
    _require(bool(found["artifact"]) or isinstance(found.get("rule"), str))
    for needed, each in (
        *((("file", "sha256"), each) for each in artifacts),
        *((("file", "sha256", "autov2"), each) for each in found["loras"].values()),
    ):
        _require(isinstance(each, dict) and all(isinstance(v, str) for v in each.values()))
        _require(set(needed) <= each.keys())
    prompts = found["prompts"]
    _require(bool(prompts) and all(type(prompt) is str for prompt in prompts))
    _require(all(type(weight) in (int, float) for weight in found["weights"].values()))
    _require(found["facts"].keys() >= FACTS.keys() and found["count"] > 0)
    _require(isinstance(found.get("rule"), str | None))
    _require(isinstance(found.get("rule_settings", {}), dict))
    own = {name: found[name] for name in ("rule", "rule_settings") if name in found}
    return Making(**{name: found[name] for name in _TYPES} | own | {"prompts": tuple(prompts)})


#: Field of a making -> its type in JSON.
_TYPES: Mapping[str, Any] = {
    **dict.fromkeys(("artifact", "always", "loras", "settings", "weights", "facts"), dict),
    **dict.fromkeys(("model", "mode", "missing", "dtype"), str),
    **dict.fromkeys(("seed", "count"), int),
    "prompts": list,
    "scheduler": str | None,
}


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError


def _stated(parameters: Mapping[str, Any]) -> str:
    """Return settings in a few words; of a table only that there is one."""
    return ", ".join(
        f"{name} {'table' if isinstance(value, Mapping) else _plain(value)}"
        for name, value in parameters.items()
    )


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _quoted(value: object) -> str:
    """Return a value of A1111's text; quoted if it would be read as several."""
    text = _plain(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:"\n') else text
