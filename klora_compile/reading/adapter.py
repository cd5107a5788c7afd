"""One LoRA as values: every key used, or the whole file refused with all reasons."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

from klora_compile.families.telling import family_of_layers
from klora_compile.reading.describing import BASE_FORMS, Describer, Piece, file_axis
from klora_compile.reading.evaluating import evaluate
from klora_compile.reading.files.base import BaseModel
from klora_compile.reading.files.lora_file import LoraFile, open_lora
from klora_compile.reading.layers import Layer, LayerFacts
from klora_compile.reading.metadata import Origin, origin_of, stated_family
from klora_compile.reading.names.account import UnusedKey, account_for
from klora_compile.reading.scale.scale import Scales
from klora_compile.settings.read_options import MAX_ERROR, ReadOptions
from klora_runtime.artifact.file import METADATA_KEY as ARTIFACT_KEY
from klora_runtime.devices.host_memory import free_host_memory
from klora_runtime.errors import FileFormatError, LoraError, shown

#: Share of the free memory that dense deltas of one LoRA may take.
_HOST_SHARE = 0.5

#: Called after each module that was read with its name, how many are done, and how many there are.
OnModule = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Survey:
    """What a LoRA file holds, told by its header; nothing is computed."""

    path: Path
    """The file with the weights."""
    layout: str
    """``peft``, ``kohya`` or ``xlabs``; joined by ``+`` where mixed."""
    names: str
    """Whose names the denoiser's modules have: ``diffusers``, or its authors', as ``bfl``."""
    family: str | None
    """Base model family; None where layers and shapes tell none."""
    origin: Origin
    keys: int
    """Number of keys in the file."""
    unused: tuple[UnusedKey, ...]
    layers: tuple[LayerFacts, ...]
    """Sorted by name; those of modules that can be read."""
    pieces: tuple[Piece, ...]
    problems: tuple[str, ...]
    """What is wrong with the rest, one sentence each."""

    @property
    def needs_base(self) -> bool:
        """Whether the file cannot be compiled without the base model's weights."""
        return any(piece.needs_base for piece in self.pieces)


@dataclass(frozen=True)
class Adapter:
    """One LoRA as read."""

    path: Path
    """The file with the weights."""
    nbytes: int
    layout: str
    """See :attr:`Survey.layout`."""
    names: str
    """See :attr:`Survey.names`."""
    family: str | None
    """See :attr:`Survey.family`."""
    keys: int
    """Number of keys in the file."""
    unused: tuple[UnusedKey, ...]
    """Keys that were left out because it was asked for."""
    layers: Mapping[str, Layer]
    """Layer name -> layer, sorted by name."""
    origin: Origin
    """What the file says about where it is from."""
    options: ReadOptions
    """How it was read."""
    sha256: str
    """Of that whole file."""

    @property
    def known(self) -> Mapping[str, Layer]:
        """:attr:`layers`."""
        return self.layers

    @property
    def needed_base(self) -> bool:
        """Whether the base model's weights were needed."""
        return any(layer.form in BASE_FORMS for layer in self.layers.values())

    @property
    def trigger_words(self) -> tuple[str, ...]:
        """See :attr:`Origin.trigger_words`."""
        return self.origin.trigger_words

    @property
    def license(self) -> str | None:
        """See :attr:`Origin.license`."""
        return self.origin.license

    @property
    def used(self) -> int:
        """Number of keys that were used."""
        return self.keys - len(self.unused)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks of weights, ascending."""
        return tuple(sorted({v.rank for v in self.layers.values() if v.parameter == "weight"}))


def read_adapter(
    path: str | os.PathLike[str],
    options: ReadOptions | None = None,
    *,
    on_module: OnModule | None = None,
) -> Adapter:
    """Read a LoRA.

    Args:
        path: a ``.safetensors``, ``.pt``, ``.bin`` or ``.ckpt`` file, or an adapter folder as PEFT
            and diffusers save it; in any layout of ``families`` and any form of ``forms``.
        options: how to read it.
        on_module: called after each module.

    Raises:
        LoraError: the file cannot be read, a key is of no known layout or form, half a pair is
            missing, a shape, dtype or value is impossible, two sources state different alphas, or
            the base model is needed and was not given. ``issues`` lists every problem.
    """
    with open_adapter(path, options) as opened:
        return opened.read(on_module)


@dataclass(frozen=True)
class OpenAdapter:
    """A LoRA whose file is open and whose header is in order; its numbers are not read yet."""

    survey: Survey
    options: ReadOptions
    file: LoraFile
    base: BaseModel | None
    """Where it is needed."""

    @property
    def path(self) -> Path:
        """See :attr:`Survey.path`."""
        return self.survey.path

    @property
    def family(self) -> str | None:
        """See :attr:`Survey.family`."""
        return self.survey.family

    @property
    def known(self) -> Mapping[str, LayerFacts]:
        """Layer name -> what is known of the layer, sorted by name."""
        return {facts.name: facts for facts in self.survey.layers}

    def read(self, on_module: OnModule | None = None) -> Adapter:
        """All of it; see :func:`read_adapter`."""
        with ThreadPoolExecutor(1) as hashing:  # meanwhile
            sha256 = hashing.submit(lambda: self.file.sha256)
            layers = self._layers(on_module)
            digest = sha256.result()
        found = self.survey
        return Adapter(
            path=found.path,
            nbytes=self.file.size,
            layout=found.layout,
            names=found.names,
            family=found.family,
            keys=found.keys,
            unused=found.unused,
            layers={name: layers[name] for name in sorted(layers)},
            origin=found.origin,
            options=self.options,
            sha256=digest,
        )

    def _layers(self, on_module: OnModule | None) -> dict[str, Layer]:
        """All layers by name, or everything that is wrong with their values."""
        axis = file_axis(self.survey.pieces)
        assert not isinstance(axis, str)
        max_error = self.options.max_error
        layers: dict[str, Layer] = {}
        problems: list[str] = []
        for index, piece in enumerate(self.survey.pieces, start=1):
            for one in evaluate(piece, self.file, base=self.base, axis=axis, max_error=max_error):
                if isinstance(one, str):
                    problems.append(f"{shown(piece.module.name)}: {one}")
                else:
                    layers[one.name] = one
            if on_module is not None:
                on_module(piece.module.name, index, len(self.survey.pieces))
        if problems:
            raise _problematic(_where(self.file), problems)
        return layers


@contextmanager
def open_adapter(
    path: str | os.PathLike[str], options: ReadOptions | None = None
) -> Iterator[OpenAdapter]:
    """Open a LoRA and check all that its header tells; see :func:`read_adapter`."""
    options = options or ReadOptions()
    with ExitStack() as stack, file_errors():
        file = stack.enter_context(open_lora(Path(path)))
        where = _where(file)
        found = _survey(file, options, where)
        refusal = _refusal(found, options, where)
        if refusal is not None:
            raise refusal
        _refuse_large(found, options, where)
        base = None
        if found.needs_base:
            assert options.base is not None
            base = stack.enter_context(BaseModel(options.base))
        yield OpenAdapter(found, options, file, base)


@contextmanager
def file_errors() -> Iterator[None]:
    """Inside, what is wrong with a file is wrong with a LoRA."""
    try:
        yield
    except LoraError:
        raise
    except FileFormatError as error:
        raise LoraError(str(error), error.issues) from error


def _where(file: LoraFile) -> str:
    return f"LoRA file {shown(file.path)}"


def survey(
    path: str | os.PathLike[str], options: ReadOptions | None = None
) -> tuple[Survey, LoraError | None]:
    """Look at a LoRA without computing it.

    Returns:
        What it holds, and why it could not be compiled with these options, if so.

    Raises:
        LoraError: the file cannot be opened, or holds nothing of a LoRA.
    """
    options = options or ReadOptions()
    with file_errors(), open_lora(Path(path)) as file:
        where = _where(file)
        found = _survey(file, options, where)
        return found, _refusal(found, options, where)


def _survey(file: LoraFile, options: ReadOptions, where: str) -> Survey:
    if ARTIFACT_KEY in file.metadata:
        raise LoraError(
            f"{where} is an artifact of klora already; compile the LoRAs it was made of, or "
            "apply it as it is."
        )
    if not file.tensors:
        raise LoraError(f"{where} holds no tensors.")
    shapes = {key: info.shape for key, info in file.tensors.items()}
    account = account_for(shapes, stated_family(file.metadata))
    describer = Describer(file, account, Scales(file.metadata, file.config, where), options)
    pieces: list[Piece] = []
    problems = list(account.problems)
    for module in account.modules:
        described = describer.pieces(module)
        for one in described:
            if isinstance(one, Piece):
                pieces.append(one)
            else:
                problems.append(f"{shown(module.name)}: {one}")
    layers = {}
    for piece in pieces:
        for facts in piece.layers:
            if facts.name in layers:
                problems.append(
                    f"{shown(piece.module.name)}: is {facts.name}, and so is another module"
                )
            layers[facts.name] = facts
    axis = file_axis(pieces)
    if isinstance(axis, str):
        problems.append(axis)
    return Survey(
        path=file.path,
        layout=account.layout,
        names=account.names,
        family=family_of_layers(layers.values(), account.families),
        origin=origin_of(file),
        keys=len(file.tensors),
        unused=account.unused,
        layers=tuple(layers[name] for name in sorted(layers)),
        pieces=tuple(pieces),
        problems=tuple(problems),
    )


def _refuse_large(found: Survey, options: ReadOptions, where: str) -> None:
    """Refuse what the host's memory does not hold, before it is filled."""
    numbers = sum(prod(piece.facts.shape) for piece in found.pieces if piece.grows)
    needed, free = 4 * numbers, _HOST_SHARE * free_host_memory()
    if needed > free and options.max_error <= MAX_ERROR:
        raise LoraError(
            f"{where}: its deltas are not low rank, take {needed / 1e9:.2g} GB as they are, and "
            f"{free / 1e9:.2g} GB can be had. --max-error 0.05 makes them smaller."
        )


def _refusal(found: Survey, options: ReadOptions, where: str) -> LoraError | None:
    if found.unused and not (options.ignore_unknown and (found.layers or found.problems)):
        return _unusable(where, found.keys, found.unused)
    if found.problems:
        return _problematic(where, found.problems)
    if not found.layers:
        return LoraError(f"{where} changes no layer.")
    if found.needs_base and options.base is None:
        layers = [piece.module.name for piece in found.pieces if piece.needs_base]
        return LoraError(
            f"{where}: {_count(layers, 'module')} of it say what the weight becomes and not how "
            "it differs (DoRA, or new values), which needs the base model's weights; name it with "
            "--base PATH (a diffusers folder or one safetensors file).",
            [shown(layer) for layer in layers],
        )
    return None


def _problematic(where: str, problems: Sequence[str]) -> LoraError:
    count = _count(problems, "reason")
    return LoraError(f"{where}: cannot be used as it is, for {count}.", problems)


def _count(things: Sequence[object], word: str) -> str:
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"


def _unusable(where: str, keys: int, unused: Sequence[UnusedKey]) -> LoraError:
    return LoraError(
        f"{where}: {len(unused)} of {keys} keys cannot be used, and klora reads a file whole or "
        "not at all. Convert it to diffusers/PEFT keys, or leave them out with --ignore-unknown.",
        [f"{shown(each.key)}: {each.why}" for each in unused],
    )
