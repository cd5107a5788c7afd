"""Adapters: a LoRA with its values. Either every key is used, or the file is refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path

from klora_compile.reading.evaluating import evaluate
from klora_compile.reading.files.base import BaseModel
from klora_compile.reading.files.lora_file import LoraFile, open_lora
from klora_compile.reading.files.refusals import named
from klora_compile.reading.layers import Layer
from klora_compile.reading.pieces import peers
from klora_compile.reading.survey import Survey, base_of, problematic, refusal, survey_of
from klora_compile.settings.read_options import MAX_ERROR, ReadOptions
from klora_runtime.devices.host_memory import free_host_memory
from klora_runtime.errors import LoraError, shown
from klora_runtime.hub.choosing import LORA
from klora_runtime.hub.fetching import located

#: Share of the free host memory that dense deltas of one LoRA may take.
_HOST_SHARE = 0.5

#: Called after each module with its name, the number of finished modules, and the total.
OnModule = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Adapter:
    """A LoRA that was read."""

    survey: Survey
    """Description of its file: path, layout, base model, origin, keys."""
    options: ReadOptions
    """Options that it was read with."""
    sha256: str
    """Digest of the file with the weights, 64 hexadecimal digits."""
    layers: Mapping[str, Layer] = field(repr=False)
    """Layer name -> layer, sorted by name."""
    base: str | None = None
    """Name of the base model whose weights it needed; None if it needed none."""

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Distinct ranks of weights, ascending."""
        return tuple(sorted({v.rank for v in self.layers.values() if v.parameter == "weight"}))


def read_adapter(
    path: str | os.PathLike[str],
    options: ReadOptions | None = None,
    *,
    on_module: OnModule | None = None,
    weight_name: str | None = None,
) -> Adapter:
    """Read a LoRA.

    Args:
        path: a ``.safetensors``, ``.pt``, ``.bin`` or ``.ckpt`` file, or a folder that PEFT or
            diffusers saved; in any known layout and any form of ``forms``. Or its name on the
            Hugging Face Hub: ``OWNER/NAME``, ``OWNER/NAME/FILE``,
            ``hf://OWNER/NAME@REVISION/FILE``, or its https address.
        options: options of reading.
        on_module: called after each module.
        weight_name: the file in a repository of the Hub that has several.

    Raises:
        LoraError: the file cannot be read, a key has no known layout or form, half of a pair is
            missing, a shape, dtype or value is impossible, two sources state different alphas, or
            the base model is needed but not given. ``issues`` lists every problem.
        ConfigError: the name on the Hub means no file, or several.
        KloraError: the Hub does not give the file.
    """
    with open_adapter(located(path, LORA, weight_name), options) as opened:
        return opened.read(on_module)


@contextmanager
def open_adapter(
    path: str | os.PathLike[str],
    options: ReadOptions | None = None,
    shared: BaseModel | None = None,
) -> Iterator[OpenAdapter]:
    """Open a LoRA and check its whole header; see :func:`read_adapter`.

    Args:
        shared: the open base model of the options, if other LoRAs need it too.
    """
    options = options or ReadOptions()
    with (
        open_lora(Path(located(path, LORA))) as file,
        base_of(options) if shared is None else nullcontext(shared) as base,
    ):
        yield _in_order(survey_of(file, options, base), file, options, base)


def look_into(
    path: str | os.PathLike[str], options: ReadOptions | None = None, *, values: bool = True
) -> tuple[Survey, Adapter | LoraError | None]:
    """Read a LoRA as far as possible.

    Args:
        path: see :func:`read_adapter`.
        options: options of reading.
        values: whether to read the values too, which needs torch.

    Returns:
        The survey of its header; and the LoRA, the reason why it cannot be compiled, or None if its
        header is valid and its values were not read.

    Raises:
        LoraError: the file cannot be opened, or is not a LoRA.
    """
    options = options or ReadOptions()
    with open_lora(Path(located(path, LORA))) as file, base_of(options) as base:
        found = survey_of(file, options, base)
        try:
            opened = _in_order(found, file, options, base)
            return found, opened.read() if values else None
        except LoraError as error:
            return found, error


def _in_order(
    found: Survey, file: LoraFile, options: ReadOptions, base: BaseModel | None
) -> OpenAdapter:
    """Return an open adapter, or refuse the file if its header has problems."""
    error = refusal(found, options)
    if error is not None:
        raise error
    _refuse_large(found, options)
    return OpenAdapter(found, options, file, base)


@dataclass(frozen=True)
class OpenAdapter:
    """A LoRA with an open file and a valid header, whose values are not read yet."""

    survey: Survey
    options: ReadOptions
    file: LoraFile
    base: BaseModel | None
    """The base model, if one is given."""

    def read(self, on_module: OnModule | None = None) -> Adapter:
        """Read the values; see :func:`read_adapter`."""
        with ThreadPoolExecutor(1) as hashing:  # in parallel with reading
            sha256 = hashing.submit(lambda: self.file.sha256)
            layers = self._layers(on_module)
            base = None if self.base is None or not self.survey.needs_base else self.base.name
            return Adapter(self.survey, self.options, sha256.result(), layers, base)

    def _layers(self, on_module: OnModule | None) -> dict[str, Layer]:
        """Return all layers by name, or raise with all problems of their values."""
        found, max_error = self.survey, self.options.max_error
        layers: dict[str, Layer] = {}
        problems: list[str] = []
        of_forms = peers(found.pieces)
        for index, piece in enumerate(found.pieces, start=1):
            values = evaluate(
                piece,
                self.file,
                base=self.base,
                axis=found.axis,
                max_error=max_error,
                peers=of_forms,
            )
            for one in values:
                if isinstance(one, str):
                    problems.append(f"{shown(piece.module.name)}: {one}")
                else:
                    layers[one.name] = one
            if on_module is not None:
                on_module(piece.module.name, index, len(found.pieces))
        if problems:
            raise problematic(found.path, problems)
        return {name: layers[name] for name in sorted(layers)}


def _refuse_large(found: Survey, options: ReadOptions) -> None:
    """Refuse a LoRA whose dense deltas do not fit into the host's memory."""
    numbers = sum(prod(piece.facts.shape or ()) for piece in found.pieces if piece.grows)
    if not numbers:
        return
    needed, free = 4 * numbers, _HOST_SHARE * free_host_memory()
    if needed > free and options.max_error <= MAX_ERROR:
        raise LoraError(
            f"{named(found.path)}: its deltas are not low-rank and would need "
            f"{needed / 1000000000.0:.2g} GB as dense deltas; {free / 1000000000.0:.2g} GB are "
            "free. Pass --max-error 0.05 to approximate them."
        )
