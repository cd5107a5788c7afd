"""Every scheduler class of diffusers: how it tells its noise, and all ways to set its timesteps."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers.schedulers
import numpy as np
import pytest
from reference import Level

FOLDER = Path(diffusers.schedulers.__file__).parent

#: Class -> how it tells its noise; of all others the timestep is an index of the training.
_LEVELS: Mapping[str, Level] = {
    **dict.fromkeys(
        (
            *("FlowMapEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
            *("FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", "HeliosDMDScheduler"),
            *("HeliosScheduler", "LTXEulerAncestralRFScheduler", "MiniMaxH3Scheduler"),
            "PiflowScheduler",
        ),
        "flow",
    ),
    **dict.fromkeys(
        (
            *("CMStochasticIterativeScheduler", "CosineDPMSolverMultistepScheduler"),
            *("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"),
        ),
        "sigma",
    ),
    "DDPMWuerstchenScheduler": "time",
    "IPNDMScheduler": "time",
    "RFD4ProteinaScheduler": "rising time",
    "SCMScheduler": "angle",
}

#: Classes whose last timestep is where the last step ends.
_LIST_THE_END = ("DDPMWuerstchenScheduler", "SCMScheduler")

#: What a class must be made with.
_MADE_WITH: Mapping[str, Mapping[str, Any]] = {
    "AmusedScheduler": {"mask_token_id": 1},
    "HeliosDMDScheduler": {"stages": 1},
    "HeliosScheduler": {"stages": 1},
    "RFD4ProteinaScheduler": {
        "schedule_mode": "log",
        "noise_mode": "1/t",
        "tsr_k": 1.0,
        "tsr_sigma": 1.0,
        "tail_steps": 0,
    },
    "VQDiffusionScheduler": {"num_vec_classes": 8},
}

#: Number of steps where a class does not take 4, and what else its timesteps are set with.
_STEPS: Mapping[str, int] = {"ConsistencyDecoderScheduler": 2, "MiniMaxH3Scheduler": 5}
_SET_WITH: Mapping[str, Mapping[str, Any]] = {"SCMScheduler": {"intermediate_timesteps": None}}

#: Setting -> what the table calls it.
_SPACINGS = {
    "use_karras_sigmas": "Karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "Lu",
}
_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}

_TIMESTEPS = [999, 700, 400, 100]
_SIGMAS = [1.0, 0.8, 0.5, 0.2]
#: Class -> timesteps and sigmas of its own units; None where it does not take a list by that name.
_OWN_TIMESTEPS: Mapping[str, Any] = {
    "CMStochasticIterativeScheduler": [39, 25, 10, 1],
    "DDPMWuerstchenScheduler": [1.0, 0.6, 0.2, 0.0],
    "FlowMapEulerDiscreteScheduler": [1000.0, 800.0, 500.0, 200.0],
    "FlowMatchEulerDiscreteScheduler": [1000.0, 800.0, 500.0, 200.0],
    "FlowMatchLCMScheduler": [1000.0, 800.0, 500.0, 200.0],
    "LTXEulerAncestralRFScheduler": [1.0, 0.8, 0.5, 0.0],
    "PiflowScheduler": None,
    "SCMScheduler": [1.5, 1.0, 0.5, 0.2, 0.0],
}
_OWN_SIGMAS: Mapping[str, Any] = {
    "EDMEulerScheduler": None,  # ``sigmas`` is where Karras' ramp is made of
    "EulerDiscreteScheduler": [14.0, 6.0, 2.0, 0.5, 0.0],
    "HeliosDMDScheduler": None,
    "HeliosScheduler": None,
    "LTXEulerAncestralRFScheduler": [1.0, 0.8, 0.5, 0.0],
    "MiniMaxH3Scheduler": [1.0, 0.8, 0.5, 0.0],
    "PiflowScheduler": None,
    "UniPCMultistepScheduler": np.array(_SIGMAS),
}


@dataclass(frozen=True)
class Variant:
    """One way to set the timesteps of a class."""

    name: str
    made_with: Mapping[str, Any] = field(default_factory=dict)
    set_with: Mapping[str, Any] = field(default_factory=dict)
    level: Level = "training"
    lists_the_end: bool = False


@cache
def _homes() -> Mapping[str, str]:
    """Class -> its module, read from the source: some modules need a library."""
    homes = {}
    for path in FOLDER.rglob("scheduling_*.py"):
        parts = path.relative_to(FOLDER).with_suffix("").parts
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Scheduler"):
                homes[node.name] = ".".join(("diffusers.schedulers", *parts))
    return homes


def names() -> list[str]:
    """The names of all scheduler classes."""
    return sorted(_homes())


@cache
def class_of(name: str) -> Any:
    """The class of this name, also where the library that adds its noise is absent."""
    with pytest.MonkeyPatch.context() as patched:
        if importlib.util.find_spec("torchsde") is None:
            patched.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
        return getattr(importlib.import_module(_homes()[name]), name)


def made(name: str, variant: Variant | None = None) -> Any:
    """A scheduler of this class."""
    own = {} if variant is None else variant.made_with
    with _beta(name):
        return class_of(name)(**{**_MADE_WITH.get(name, {}), **own})


def set_timesteps(scheduler: Any, name: str, variant: Variant) -> None:
    """Set the timesteps of a scheduler that was made as this variant."""
    with _beta(name):
        scheduler.set_timesteps(**variant.set_with)


@contextmanager
def _beta(name: str) -> Iterator[None]:
    """Let spacings by a beta distribution do without scipy: with another curve from 0 to 1."""
    curve = SimpleNamespace(ppf=lambda share, *_: share * share * (3 - 2 * share))
    scipy = SimpleNamespace(stats=SimpleNamespace(beta=curve))
    module = sys.modules[class_of(name).__module__]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "scipy", scipy, raising=False)
        patched.setattr(module, "is_scipy_available", lambda: True, raising=False)
        yield


def variants(name: str) -> Iterator[Variant]:
    """All ways to set the timesteps of a class, that of its defaults first."""
    level = _LEVELS.get(name, "training")
    ends = name in _LIST_THE_END
    whole = {"num_inference_steps": _STEPS.get(name, 4), **_SET_WITH.get(name, {})}
    config = inspect.signature(class_of(name)).parameters
    arguments = inspect.signature(class_of(name).set_timesteps).parameters
    yield Variant("", {}, whole, level, ends)
    for option, word in _SPACINGS.items():
        if option in config:
            yield Variant(word, {option: True}, whole, level, ends)
    if "sigma_schedule" in config:
        yield Variant("exponential", {"sigma_schedule": "exponential"}, whole, level, ends)
    if "invert_sigmas" in config:
        yield Variant("inverted", {"invert_sigmas": True}, whole, "inverted", ends)
    if "use_flow_sigmas" in config and level == "training":
        yield Variant("flow", _FLOW, whole, "flow", ends)
    if "timestep_spacing" in config:
        yield Variant("trailing", {"timestep_spacing": "trailing"}, whole, level, ends)
    custom = _OWN_TIMESTEPS.get(name, _TIMESTEPS)
    if "timesteps" in arguments and custom is not None:
        also = {"num_inference_steps": 4} if name == "SCMScheduler" else {}
        extra = {"max_timesteps": None, **_SET_WITH[name]} if name == "SCMScheduler" else {}
        ends_here = ends or name == "LTXEulerAncestralRFScheduler"
        yield Variant("timesteps=", {}, {"timesteps": custom, **also, **extra}, level, ends_here)
    custom = _OWN_SIGMAS.get(name, _SIGMAS)
    if "sigmas" in arguments and custom is not None:
        ends_here = name == "LTXEulerAncestralRFScheduler"
        flow = _FLOW if "use_flow_sigmas" in config else {}
        own = "flow" if flow else level
        yield Variant("sigmas=", flow, {"sigmas": custom}, own, ends_here)
