"""The double of ``comfy.model_patcher`` and ``comfy.patcher_extension``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


class WrappersMP:
    SAMPLER_SAMPLE = "sampler_sample"
    PREDICT_NOISE = "predict_noise"


@dataclass
class PatcherInjection:
    inject: Callable[[Any], None]
    eject: Callable[[Any], None]


class Executor:
    """A function with wrappers around it; a wrapper calls the executor that it is given."""

    def __init__(self, original: Callable[..., Any], owner: Any, wrappers: list[Any]) -> None:
        self.original = original
        self.class_obj = owner
        self.wrappers = wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rest = Executor(self.original, self.class_obj, self.wrappers[1:])
        return rest.execute(*args, **kwargs)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](self, *args, **kwargs)


class ModelPatcher:
    """A model with changes that act once it is loaded; clones share the model."""

    def __init__(self, model: nn.Module, load_device: Any, offload_device: Any) -> None:
        self.model: Any = model
        self.load_device = load_device
        self.offload_device = offload_device
        self.patches: dict[str, list[tuple[float, torch.Tensor]]] = {}
        self.backup: dict[str, nn.Parameter] = {}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}
        self.injections: dict[str, list[PatcherInjection]] = {}
        self.attachments: dict[str, Any] = {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.is_injected = False

    def clone(self) -> ModelPatcher:
        new = type(self)(self.model, self.load_device, self.offload_device)
        new.patches = {key: list(own) for key, own in self.patches.items()}
        new.backup = self.backup
        new.wrappers = {
            kind: {key: list(own) for key, own in by_key.items()}
            for kind, by_key in self.wrappers.items()
        }
        new.injections = {key: list(own) for key, own in self.injections.items()}
        new.attachments = dict(self.attachments)
        new.is_injected = self.is_injected
        return new

    def add_patches(self, patches: Mapping[str, Any], strength: float = 1.0) -> list[str]:
        with self.use_ejected():
            known = self.model.state_dict()
            for key in patches.keys() & known.keys():
                self.patches.setdefault(key, []).append((strength, patches[key]))
        return list(patches.keys() & known.keys())

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def wrappers_of(self, kind: str) -> list[Any]:
        return [each for own in self.wrappers.get(kind, {}).values() for each in own]

    def set_injections(self, key: str, injections: list[PatcherInjection]) -> None:
        self.injections[key] = injections

    def set_attachments(self, key: str, attachment: Any) -> None:
        self.attachments[key] = attachment

    def get_attachment(self, key: str) -> Any:
        return self.attachments.get(key)

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)

    def inject_model(self) -> None:
        if self.is_injected:
            return
        for own in self.injections.values():
            for injection in own:
                injection.inject(self)
                self.is_injected = True

    def eject_model(self) -> None:
        if not self.is_injected:
            return
        for own in self.injections.values():
            for injection in own:
                injection.eject(self)
        self.is_injected = False

    @contextmanager
    def use_ejected(self) -> Iterator[None]:
        was = self.is_injected
        self.eject_model()
        try:
            yield
        finally:
            if was:
                self.inject_model()

    def patch_model(self) -> None:
        """Write the patched weights into the model as new parameters, and inject."""
        with self.use_ejected():
            for key, patches in self.patches.items():
                path, _, name = key.rpartition(".")
                module = self.model.get_submodule(path)
                held = getattr(module, name)
                self.backup.setdefault(key, held)
                total = held.detach().clone()
                for strength, delta in patches:
                    total += strength * delta.reshape(total.shape)
                setattr(module, name, nn.Parameter(total, requires_grad=False))
        self.inject_model()

    def detach(self) -> None:
        """Eject, and put the weights back."""
        self.eject_model()
        for key, held in self.backup.items():
            path, _, name = key.rpartition(".")
            setattr(self.model.get_submodule(path), name, held)
        self.backup.clear()
