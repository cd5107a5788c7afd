"""The base model's weights, which DoRA and other forms need, read one tensor at a time.

A single file in the names of the model's authors is read through the same tables as LoRAs: a table
gives each module of diffusers its rows of the fused tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from types import TracebackType

from klora_compile.base_models import INDEX, model_name, model_path
from klora_compile.families.tables import PARAMETERS
from klora_compile.reading.names.placing import choose, component_of, placements
from klora_compile.reading.names.table_index import Stem
from klora_runtime.artifact.dtypes import FLOAT8, REAL
from klora_runtime.artifact.tensor_file import TensorFile
from klora_runtime.errors import FileFormatError, LoraError, shown
from klora_runtime.families.text_encoders import CLIP_PREFIX
from klora_runtime.lazy_torch import torch

_VARIANT = ".fp16"
_FLOATS = ("F64", *REAL, *FLOAT8)
_PARAMETERS = ("weight", "bias")

#: Prefixes of a denoiser's modules in single files.
_DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "net.")
#: Prefix of a text encoder in transformers' names in checkpoints -> component.
_TEXT_PREFIXES: Mapping[str, str] = {
    "cond_stage_model.transformer.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
}
#: Part of a class's name in a component's ``config.json`` -> the component.
_CLASSES: Mapping[str, str] = {
    "UNet": "unet",
    "Transformer": "transformer",
    "CLIPTextModelWithProjection": "text_encoder_2",
    "CLIPTextModel": "text_encoder",
}


@dataclass(frozen=True)
class _Place:
    """The place of a parameter."""

    file: TensorFile
    key: str
    rows: tuple[range, ...] | None = None
    """Rows of the stored tensor, in this order; None for all rows."""


#: Parameter name inside a component -> its place.
_Index = dict[str, _Place]


class BaseModel:
    """A base model that opens its files lazily. Use it as a context manager.

    Args:
        name: a folder that diffusers' ``save_pretrained`` wrote, of a pipeline or a component; or a
            safetensors file, in diffusers' names or the authors'; or the name on the Hugging Face
            Hub of a pipeline or a file, which is downloaded when a weight is needed.

    The methods raise a LoraError if it is none of these, and a KloraError if the Hub does not give
    it.
    """

    def __init__(self, name: str | os.PathLike[str]) -> None:
        self._name = name
        self._where = f"base model {shown(name)}"
        self._stack = ExitStack()

    @cached_property
    def _path(self) -> Path:
        return model_path(self._name)  # once, so all weights come from one commit

    @property
    def name(self) -> str:
        """Name for an artifact; see :func:`~klora_compile.base_models.model_name`."""
        return model_name(self._path)

    @cached_property
    def _is_pipeline(self) -> bool:
        return (self._path / INDEX).is_file()

    @cached_property
    def _components(self) -> dict[str, _Index]:
        """The open components; those of a pipeline are opened on request."""
        if not self._path.is_dir():
            return self._of_file(self._opened(self._path))
        return {} if self._is_pipeline else {self._own_component(): self._of_folder(self._path)}

    def shape(
        self, component: str, module: str, parameter: str = "weight"
    ) -> tuple[int, ...] | None:
        """Return the shape of a parameter, None if it is missing; see :meth:`weight`."""
        place = self._place(component, _joined(module, parameter))
        if place is None:
            return None
        shape = place.file.tensors[place.key].shape
        return shape if place.rows is None else (sum(map(len, place.rows)), *shape[1:])

    def _place(self, component: str, name: str) -> _Place | None:
        if component not in self._components and self._is_pipeline:
            self._components[component] = self._of_folder(self._path / component)
        return self._components.get(component, {}).get(name)

    def __enter__(self) -> BaseModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def weight(self, component: str, module: str, parameter: str = "weight") -> torch.Tensor:
        """Return one parameter in new memory and the file's dtype.

        Args:
            component: component, such as ``unet``.
            module: dotted diffusers module path, CLIP's without ``text_model.``; empty for the
                component itself.

        Raises:
            LoraError: the parameter is missing or quantised.
        """
        name = _joined(module, parameter)
        place = self._place(component, name)
        if place is None:
            raise LoraError(
                f"{self._where}: has no {component}.{shown(name)}. Name the folder of the whole "
                "pipeline that the LoRA was trained for, as diffusers saves it."
            )
        dtype = place.file.tensors[place.key].dtype
        if dtype not in _FLOATS:
            raise LoraError(
                f"{self._where}: {component}.{shown(name)} is {dtype}, which is quantised. "
                "Give the model in float16, bfloat16 or float32."
            )
        tensor = place.file.tensor(place.key)
        if place.rows is None:
            return tensor
        return torch.cat([tensor[rows.start : rows.stop] for rows in place.rows])

    def _opened(self, path: Path) -> TensorFile:
        try:
            return self._stack.enter_context(TensorFile(path, "base model"))
        except FileFormatError as error:
            raise LoraError(str(error)) from error

    def _own_component(self) -> str:
        """Return the component that a folder without a pipeline holds."""
        try:
            config = json.loads((self._path / "config.json").read_text())
            kinds = " ".join([config.get("_class_name", ""), *config.get("architectures", [])])
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            kinds = ""
        found = next((name for part, name in _CLASSES.items() if part in kinds), None)
        if found is None:
            raise LoraError(
                f"{self._where}: has neither a model_index.json nor the config.json of a "
                "denoiser or a text encoder. Name a folder that diffusers saved."
            )
        return found

    def _of_folder(self, folder: Path) -> _Index:
        """Return the index of one component's folder, from all its shards."""
        paths = sorted(folder.glob("*.safetensors"))
        paths = [path for path in paths if _VARIANT not in path.name] or paths
        if not paths:
            raise LoraError(
                f"{self._where}: has no safetensors files of {shown(folder.name)}. "
                "Save it again with pipe.save_pretrained(FOLDER)."
            )
        found: _Index = {}
        for path in paths:
            file = self._opened(path)
            for key in file.tensors:
                name = key.removeprefix(CLIP_PREFIX)
                if name in found:
                    raise LoraError(
                        f"{self._where}: two files of {shown(folder.name)} have {shown(name)}."
                    )
                found[name] = _Place(file, key)
        return found

    def _of_file(self, file: TensorFile) -> dict[str, _Index]:
        """Return the indices of a single file: its denoiser, and text encoders."""
        found: dict[str, _Index] = {}
        for prefix, component in _TEXT_PREFIXES.items():
            own = {
                key.removeprefix(prefix).removeprefix(CLIP_PREFIX): _Place(file, key)
                for key in file.tensors
                if key.startswith(prefix)
            }
            if own:
                found[component] = own
        for component, name, place in _denoiser(file):
            found.setdefault(component, {})[name] = place
        if not found:
            raise LoraError(
                f"{self._where}: holds no model whose names klora knows. Name the folder of the "
                "pipeline, as diffusers saves it."
            )
        return found


def _denoiser(file: TensorFile) -> Iterator[tuple[str, str, _Place]]:
    """Yield component, name and place of every parameter that a table of ``families`` knows."""
    prefix = next(
        (each for each in _DENOISER_PREFIXES if any(key.startswith(each) for key in file.tensors)),
        "",
    )
    modules: dict[Stem, dict[str, str]] = {}
    for key in file.tensors:
        module, _, last = key.removeprefix(prefix).rpartition(".")
        parameter = "weight" if last == "scale" else last  # norms in the names of FLUX' authors
        if not key.startswith(prefix):
            continue
        if parameter in PARAMETERS:
            modules[Stem(_joined(module, parameter), flat=False)] = {"": key}
        elif module and parameter in _PARAMETERS:
            modules.setdefault(Stem(module, flat=False), {})[parameter] = key
    shapes = {
        stem: (shape[0], prod(shape[1:])) if len(shape) > 1 else None
        for stem, keys in modules.items()
        if (shape := file.tensors[keys.get("weight", next(iter(keys.values())))].shape)
    }
    choice = choose(shapes) if shapes else None
    if choice is None or choice.table is None:
        return
    for stem, keys in modules.items():
        if stem in choice.strangers or stem not in shapes:
            continue
        component = component_of(choice.table, stem)
        for parameter, key in keys.items():
            rows, inner = shapes[stem] or (file.tensors[key].shape[0], None)
            places = placements(choice.table, stem, rows, inner)
            if isinstance(places, str):
                continue
            for place in places:
                yield component, _joined(place.path, parameter), _Place(file, key, place.rows)


def _joined(module: str, parameter: str) -> str:
    return ".".join(filter(None, (module, parameter)))
