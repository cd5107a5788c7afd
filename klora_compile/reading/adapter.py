"""One LoRA file as values: every key used, or the whole file refused with all reasons."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from klora_compile.reading.key_layouts import (
    T5_COMPONENTS,
    ParsedKey,
    Part,
    UnplacedKey,
    parse_key,
)
from klora_compile.reading.layouts.rows import Layout
from klora_compile.reading.placing import choose, placements
from klora_compile.reading.scale import MAX_ALPHA, MIN_ALPHA, AdapterConfig
from klora_runtime.artifact import METADATA_KEY as ARTIFACT_KEY
from klora_runtime.errors import FileFormatError, LoraError, shown
from klora_runtime.safetensors_file import SafetensorsFile

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_HASH_BLOCK = 2**20

#: Metadata keys that hold a trigger phrase or a licence, as written by the common trainers.
_TRIGGER_KEYS = ("modelspec.trigger_phrase", "trigger_words", "trigger_word", "instance_prompt")
_LICENSE_KEYS = ("modelspec.license", "license", "source_licence")


@dataclass(frozen=True)
class Layer:
    """One layer of an adapter: delta = alpha / rank * up @ down."""

    component: str
    module: str
    """Dotted diffusers module path (CLIP without ``text_model.``)."""
    down: torch.Tensor
    """(rank, in), or (rank, in, height, width) for kernels above 1x1; values and dtype of the file:
    float32, float16 or bfloat16."""
    up: torch.Tensor
    """(out, rank) or (out, rank, 1, 1)."""
    alpha: float
    alpha_source: str
    """``tensor``, ``metadata`` or ``rank``: what :attr:`alpha` was taken from."""

    @property
    def name(self) -> str:
        """Component, dot, module path."""
        return f"{self.component}.{self.module}"

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the delta: (out, in), or (out, in, height, width)."""
        return (int(self.up.shape[0]), *map(int, self.down.shape[1:]))

    @property
    def numel(self) -> int:
        """Elements of the delta."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Adapter:
    """One LoRA as read."""

    path: Path
    sha256: str
    """Of the whole file."""
    nbytes: int
    layout: str
    """``peft``, ``kohya``, and whose names the modules have where those are not diffusers', such
    as ``bfl``; joined by ``+``."""
    keys: int
    """Number of keys in the file, all of them used."""
    layers: Mapping[str, Layer]
    """Layer name -> layer, sorted by name."""
    trigger_words: tuple[str, ...]
    license: str | None

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks, ascending."""
        return tuple(sorted({layer.rank for layer in self.layers.values()}))


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read a LoRA file.

    Args:
        path: a ``.safetensors`` file with diffusers/PEFT or kohya keys; see ``key_layouts``.

    Raises:
        LoraError: the file cannot be read, a key is of no known layout or form, half a pair is
            missing, a shape, dtype or value is impossible. ``issues`` lists every problem.
    """
    place = Path(path)
    where = f"LoRA file {shown(place)}"
    try:
        with SafetensorsFile(place, "LoRA file") as file:
            modules = _modules(file, where)
            table = _table(modules, file, where)
            config = AdapterConfig(file.metadata, place, where)
            layers = _layers(modules, table, file, config, where)
            layouts = {module.key.layout for module in modules}
            if table is not None and table.name != "diffusers":
                layouts.add(table.name)
            return Adapter(
                path=place,
                sha256=_sha256(place),
                nbytes=file.size,
                layout="+".join(sorted(layouts)),
                keys=len(file.tensors),
                layers=layers,
                trigger_words=_words(file.metadata),
                license=_first(file.metadata, _LICENSE_KEYS),
            )
    except LoraError:
        raise
    except FileFormatError as error:
        raise LoraError(str(error)) from error


@dataclass(frozen=True)
class _Module:
    """One module of a file and the keys of its parts."""

    key: ParsedKey | UnplacedKey
    parts: dict[Part, str]

    @property
    def name(self) -> str:
        return self.key.layer


def _modules(file: SafetensorsFile, where: str) -> list[_Module]:
    """Every key as a part of its module, sorted by the module's name."""
    if ARTIFACT_KEY in file.metadata:
        raise LoraError(
            f"{where} is an artifact of klora already; compile the LoRAs it was made of, or "
            "apply it as it is."
        )
    if not file.tensors:
        raise LoraError(f"{where} holds no tensors.")
    modules: dict[str, _Module] = {}
    issues = []
    for key, parsed in _parsed(sorted(file.tensors)):
        if isinstance(parsed, str):
            issues.append(f"{shown(key)}: {parsed}")
            continue
        parts = modules.setdefault(parsed.layer, _Module(parsed, {})).parts
        if parsed.part in parts:
            issues.append(
                f"{shown(key)}: is the {parsed.part.value} of {shown(parsed.layer)}, and so is "
                f"{shown(parts[parsed.part])}"
            )
        parts[parsed.part] = key
    if issues:
        raise _unusable(where, len(file.tensors), issues)
    return [modules[name] for name in sorted(modules)]


def _parsed(keys: Sequence[str]) -> Iterator[tuple[str, ParsedKey | UnplacedKey | str]]:
    """Each key, taken apart. All of a denoiser's are for a table if one in kohya's spelling is."""
    found = {key: parse_key(key) for key in keys}
    unplaced = any(
        isinstance(parsed, UnplacedKey) and parsed.stem.flat for parsed in found.values()
    )
    for key, parsed in found.items():
        if unplaced and isinstance(parsed, ParsedKey) and parsed.stem is not None:
            yield key, UnplacedKey(parsed.layout, parsed.stem, parsed.part)
        else:
            yield key, parsed


def _table(modules: Sequence[_Module], file: SafetensorsFile, where: str) -> Layout | None:
    """The table that places the modules in their authors' names; None where there are none."""
    shapes = {
        module.key.stem: _shape(module, file)
        for module in modules
        if isinstance(module.key, UnplacedKey)
    }
    if not shapes:
        return None
    table = choose(shapes)
    if isinstance(table, Layout):
        return table
    problems = [
        (key, table[module.key.stem])
        for module in modules
        if isinstance(module.key, UnplacedKey) and module.key.stem in table
        for key in module.parts.values()
    ]
    issues = [f"{shown(key)}: {problem}" for key, problem in problems]
    raise _unusable(where, len(file.tensors), issues)


def _shape(module: _Module, file: SafetensorsFile) -> tuple[int, int] | None:
    """Rows and columns of a module's weight, as its header says; None where a part is missing."""
    shapes = [file.tensors[key].shape for key in map(module.parts.get, (Part.UP, Part.DOWN)) if key]
    if len(shapes) < 2 or any(len(shape) < 2 for shape in shapes):
        return None
    return shapes[0][0], shapes[1][1]


def _unusable(where: str, keys: int, issues: Sequence[str]) -> LoraError:
    return LoraError(
        f"{where}: {len(issues)} of {keys} keys cannot be used, and klora reads a file whole or "
        "not at all. Convert it to diffusers/PEFT keys.",
        issues,
    )


def _layers(
    modules: Sequence[_Module],
    table: Layout | None,
    file: SafetensorsFile,
    config: AdapterConfig,
    where: str,
) -> dict[str, Layer]:
    layers: dict[str, Layer] = {}
    issues: list[str] = []
    for module in modules:
        whole = _whole(module, table, file, config)
        placed = whole if isinstance(whole, list) else _placed(module, table, whole)
        for layer in placed:
            if isinstance(layer, str):
                issues.append(f"{shown(module.name)}: {layer}")
            elif layer.name in layers:
                issues.append(f"{shown(module.name)}: is {layer.name}, and so is another module")
            else:
                layers[layer.name] = layer
    if issues:
        raise LoraError(f"{where}: {len(issues)} problems; get the file again.", issues)
    return {name: layers[name] for name in sorted(layers)}


def _whole(
    module: _Module, table: Layout | None, file: SafetensorsFile, config: AdapterConfig
) -> Layer | list[str]:
    """A module of the file as one layer under the file's own name, or what is wrong with it."""
    parts = module.parts
    missing = [part.value for part in (Part.DOWN, Part.UP) if part not in parts]
    if missing:
        return [f"has no {' and no '.join(missing)}"]
    component, path = _component(module, table)
    form = config.refused_form(component)
    if form is not None:
        return [f"is {form} by its metadata, which is not supported"]
    down, up = file.tensor(parts[Part.DOWN]), file.tensor(parts[Part.UP])
    problems = _pair_problems(down, up)
    if Part.ALPHA in parts and math.prod(file.tensors[parts[Part.ALPHA]].shape) != 1:
        problems.append("alpha is not one number")
    if problems:
        return problems
    alpha, source = _alpha(component, path, parts, file, config, rank=down.shape[0])
    if alpha and not MIN_ALPHA <= abs(alpha) <= MAX_ALPHA:
        return [f"alpha is {alpha}, expected 0 or {MIN_ALPHA:g} to {MAX_ALPHA:g}"]
    if all(size == 1 for size in down.shape[2:]):  # a 1x1 convolution is a linear layer
        down, up = down.flatten(1), up.flatten(1)
    return Layer(component, path, down, up, alpha, source)


def _component(module: _Module, table: Layout | None) -> tuple[str, str]:
    """Component and path of a module, the path as the file has it where a table places it."""
    if isinstance(module.key, UnplacedKey):
        assert table is not None
        return table.component, module.key.stem.name
    component = module.key.component
    if table is not None and module.key.layout == "kohya" and component == "text_encoder_3":
        component = T5_COMPONENTS.get(table.family, component)
    return component, module.key.module


def _placed(module: _Module, table: Layout | None, whole: Layer) -> Iterator[Layer | str]:
    """The layers of diffusers that a module is: one down, and the rows of up that are theirs."""
    if not isinstance(module.key, UnplacedKey):
        yield whole
        return
    assert table is not None
    out, inner = whole.shape[:2]
    places = placements(table, module.key.stem, out, inner)
    if isinstance(places, str):
        yield places
        return
    for place in places:
        up = whole.up
        if place.rows is not None:
            up = torch.cat([up[rows.start : rows.stop] for rows in place.rows])
        yield replace(whole, module=place.module, up=up)


def _pair_problems(down: torch.Tensor, up: torch.Tensor) -> list[str]:
    problems = [
        f"{name} is {tensor.dtype}, expected float32, float16 or bfloat16"
        for name, tensor in (("down", down), ("up", up))
        if tensor.dtype not in _FLOATS
    ]
    linear = down.dim() == 2 and up.dim() == 2
    conv = down.dim() == 4 and up.dim() == 4 and tuple(up.shape[2:]) == (1, 1)
    if not (linear or conv) or down.shape[0] != up.shape[1] or 0 in (*down.shape, *up.shape):
        problems.append(
            f"down {list(down.shape)} and up {list(up.shape)} are no low-rank pair: expected "
            "(rank, in) and (out, rank), or (rank, in, height, width) and (out, rank, 1, 1)"
        )
    if not problems and not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        problems.append("holds NaN or infinity")
    return problems


def _alpha(
    component: str,
    path: str,
    parts: Mapping[Part, str],
    file: SafetensorsFile,
    config: AdapterConfig,
    rank: int,
) -> tuple[float, str]:
    if Part.ALPHA in parts:
        return float(file.tensor(parts[Part.ALPHA])), "tensor"
    alpha = config.alpha(component, path, rank)
    if alpha is not None:
        return alpha, "metadata"
    return float(rank), "rank"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _first(metadata: Mapping[str, str], keys: tuple[str, ...]) -> str | None:
    return next((metadata[key] for key in keys if metadata.get(key)), None)


def _words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    phrase = _first(metadata, _TRIGGER_KEYS)
    return () if phrase is None else (phrase,)
