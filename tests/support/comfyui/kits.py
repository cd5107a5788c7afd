"""The door of tests to ComfyUI or to its double, whichever a test runs against."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.comfyui import keys, models, patching, sampling, schema
from support.lora_files import ROOT

PACK = ROOT / "examples" / "comfyui"
CHECKOUT = os.environ.get("KLORA_COMFYUI")
NEEDS_COMFYUI = "KLORA_COMFYUI does not name a folder of ComfyUI"

_CPU = torch.device("cpu")
_numbers = count()
_FLUX_NORM = "diffusion_model.double_blocks.0.img_attn.norm.query_norm"


class Double:
    """The double, with its small models."""

    name = "double"
    #: Samplers, and the step of each evaluation in a run of five steps.
    samplers = ("euler", "heun", "euler_cfg_pp")

    def modules(self) -> dict[str, ModuleType]:
        """The modules that the pack imports, by name."""
        folders = _module("folder_paths", folder_names_and_paths={}, models_dir="")
        folders.get_filename_list = lambda name: _files(folders, name)  # type: ignore[attr-defined]
        folders.get_full_path = lambda name, file: _file(folders, name, file)  # type: ignore[attr-defined]
        return {
            "comfy": _module("comfy"),
            "comfy.lora": keys,
            "comfy.patcher_extension": patching,
            "comfy.samplers": sampling,
            "comfy_api": _module("comfy_api"),
            "comfy_api.latest": schema,
            "folder_paths": folders,
        }

    def patcher(self, model: Any) -> Any:
        return patching.ModelPatcher(model, _CPU, _CPU)

    def flux(self) -> Any:
        return models.flux()

    def sd1(self) -> Any:
        return models.sd1()

    def wan(self) -> Any:
        return models.wan()

    def places(self, name: str, model: Any) -> dict[str, torch.Tensor]:
        """Parameter of diffusers -> where its numbers are in the denoiser."""
        return models.places(model, models.PLACES[name])

    def flux_norm(self, model: Any) -> str:
        """The parameter of FLUX.1's first norm; its name depends on ComfyUI's version."""
        known = dict(model.named_parameters())
        names = (f"{_FLUX_NORM}.{end}" for end in ("scale", "weight"))
        return next(name for name in names if name in known)

    def noise(self, channels: int) -> torch.Tensor:
        return torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(3))

    def sample(
        self,
        patcher: Any,
        sampler: str | Callable[..., Any] = "euler",
        steps: int = 5,
        part: slice = slice(None),
        callback: Any = None,
        scheduler: str | None = None,
        latent: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sample ``part`` of the list of noise levels, from noise or on from a latent."""
        levels = patcher.model.model_sampling
        sigmas = sampling.calculate_sigmas(levels, scheduler or "simple", steps)[part]
        function = sampling.SAMPLERS[sampler] if isinstance(sampler, str) else sampler
        channels = 16 if levels.sigma_max == 1.0 else 4
        noise = self.noise(channels)
        if latent is not None:
            noise = torch.zeros_like(noise)
        return sampling.sample(patcher, noise, sigmas, function, callback, latent)

    def load(self, patcher: Any) -> None:
        sampling.load(patcher)


class Comfy(Double):
    """ComfyUI itself, with tiny models of its own classes."""

    name = "ComfyUI"
    samplers = ("euler", "heun", "heunpp2", "dpmpp_2s_ancestral", "dpm_2", "euler_cfg_pp")

    def __init__(self) -> None:
        if CHECKOUT is None or not Path(CHECKOUT, "comfy").is_dir():
            pytest.skip(NEEDS_COMFYUI)
        if CHECKOUT not in sys.path:
            _stand_in_for_torchvision()
            sys.path.insert(0, CHECKOUT)
        from comfy.cli_args import args

        args.cpu = True
        importlib.import_module("comfy.samplers")  # the rest comes with it

    def modules(self) -> dict[str, ModuleType]:
        own = ("comfy", "comfy.lora", "comfy.patcher_extension", "comfy.samplers")
        names = (*own, "comfy_api", "comfy_api.latest", "folder_paths")
        return {name: importlib.import_module(name) for name in names}

    def patcher(self, model: Any) -> Any:
        from comfy.model_patcher import ModelPatcher

        return ModelPatcher(model, _CPU, _CPU)

    def flux(self) -> Any:
        from support.comfyui.tiny import tiny_model

        return tiny_model("flux")

    def sd1(self) -> Any:
        from support.comfyui.tiny import tiny_model

        return tiny_model("sd1")

    def wan(self) -> Any:
        from support.comfyui.tiny import tiny_model

        return tiny_model("wan")

    def places(self, name: str, model: Any) -> dict[str, torch.Tensor]:
        from support.comfyui.tiny import numbers_of

        return numbers_of(name)

    def sample(
        self,
        patcher: Any,
        sampler: str | Callable[..., Any] = "euler",
        steps: int = 5,
        part: slice = slice(None),
        callback: Any = None,
        scheduler: str | None = None,
        latent: torch.Tensor | None = None,
    ) -> torch.Tensor:
        import comfy.samplers
        from support.comfyui.tiny import FAMILIES, conditioning, noise_for

        if not isinstance(sampler, str):
            raise TypeError("ComfyUI's own samplers have names")
        scheduler = scheduler or FAMILIES[patcher.model.tiny].scheduler
        runner = comfy.samplers.KSampler(
            patcher, steps, _CPU, sampler, scheduler, None, patcher.model_options
        )
        noise = noise_for(patcher.model)
        empty = torch.zeros_like(noise)
        return runner.sample(  # type: ignore[no-any-return]
            noise if latent is None else empty,
            *conditioning(patcher.model),
            2.0,
            latent_image=empty if latent is None else latent,
            sigmas=runner.sigmas[part],
            callback=callback,
            disable_pbar=True,
            seed=5,
        )

    def load(self, patcher: Any) -> None:
        import comfy.model_management

        comfy.model_management.load_models_gpu([patcher])


def pack(module: str = "") -> Any:
    """Load klora's nodes as ComfyUI does, from their folder; a module of them, if it is named."""
    name = f"klora_nodes_{next(_numbers)}"
    spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return importlib.import_module(f"{name}.{module}") if module else loaded


def kits() -> Sequence[str]:
    """The names of the kits that tests run against."""
    return ("double", "ComfyUI") if CHECKOUT else ("double",)


def kit_named(name: str) -> Double:
    return Double() if name == "double" else Comfy()


def _module(name: str, **attributes: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(attributes)
    made.__path__ = []
    return made


class _Empty(ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _stand_in_for_torchvision() -> None:
    """ComfyUI imports these when it is loaded, and no model here uses them."""
    importlib.import_module("diffusers.loaders.peft")  # it asks early whether torchvision is there
    for name in ("torchvision", "torchaudio"):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = _Empty(name)
            for part in (f"{name}.{part}" for part in _PARTS):
                sys.modules[part] = _Empty(part)
                parent, _, last = part.rpartition(".")
                setattr(sys.modules[parent], last, sys.modules[part])


#: Modules of torchvision and torchaudio that ComfyUI imports.
_PARTS = ("functional", "models", "ops", "transforms", "transforms.functional")


def _files(folders: Any, name: str) -> list[str]:
    paths, endings = folders.folder_names_and_paths[name]
    found = (p.relative_to(f).as_posix() for f in map(Path, paths) for p in f.rglob("*.*"))
    return sorted(file for file in found if Path(file).suffix in endings)


def _file(folders: Any, name: str, file: str) -> str | None:
    paths, _ = folders.folder_names_and_paths[name]
    return next((str(Path(f, file)) for f in paths if Path(f, file).is_file()), None)
