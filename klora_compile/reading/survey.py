"""Surveys: the contents of a LoRA file, from its whole header and before any computation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from klora_compile.families.stating import stated_family
from klora_compile.reading.describing import Describer
from klora_compile.reading.files.base import BaseModel
from klora_compile.reading.files.lora_file import LoraFile
from klora_compile.reading.files.refusals import named
from klora_compile.reading.forms.catalogue import FORMS
from klora_compile.reading.forms.dora import Axis
from klora_compile.reading.layers import LayerFacts
from klora_compile.reading.metadata import Origin, origin_of
from klora_compile.reading.names.account import Account, UnusedKey, account_for
from klora_compile.reading.pieces import Piece, file_axis
from klora_compile.reading.scale.scale import Scales
from klora_compile.reading.telling import families_having, families_of_layers
from klora_compile.settings.read_options import ReadOptions
from klora_runtime.artifact.document import METADATA_KEY as ARTIFACT_KEY
from klora_runtime.errors import LoraError, shown
from klora_runtime.families.catalogue import FAMILIES, families_name, family_name


@dataclass(frozen=True)
class Survey:
    """The contents of a LoRA file according to its header."""

    path: Path
    """The file with the weights."""
    nbytes: int
    """Size of the whole file in bytes."""
    layout: str
    """``peft``, ``kohya`` or ``xlabs``, joined by ``+`` if mixed."""
    names: str
    """Naming of the denoiser's modules: ``diffusers``, or its authors', such as ``bfl``."""
    family: str | None
    """Base model family; None if layers and shapes do not identify exactly one."""
    families: tuple[str, ...]
    """Sorted families that layers and shapes allow."""
    origin: Origin
    """The origin that the file states."""
    keys: int
    """Number of keys in the file."""
    unused: tuple[UnusedKey, ...]
    """Keys that klora cannot use."""
    layers: tuple[LayerFacts, ...] = field(repr=False)
    """Layers of readable modules, sorted by name."""
    pieces: tuple[Piece, ...] = field(repr=False)
    """The pieces that the layers are computed from."""
    axis: Axis | None
    """Axis of the magnitudes of DoRA layers."""
    problems: tuple[str, ...]
    """Problems of the other modules, one sentence each."""

    @property
    def used(self) -> int:
        """Number of keys that klora uses."""
        return self.keys - len(self.unused)

    @property
    def needs_base(self) -> bool:
        """Whether the file cannot be compiled without the base model's weights."""
        return any(piece.needs_base for piece in self.pieces)


def _without_layers(account: Account) -> Iterator[str]:
    """Yield the problems of parts for all layers in a file that has no layer of their form."""
    forms = {module.form for module in account.modules}
    for part, key in account.shared.items():
        for form in FORMS:
            if form.alone and form.shares(part) and form not in forms:
                yield f"{shown(key)}: {form.alone}"


def base_of(options: ReadOptions) -> AbstractContextManager[BaseModel | None]:
    """Return a context with the given base model, if any; it is opened lazily."""
    return nullcontext() if options.base is None else BaseModel(options.base)


def survey_of(file: LoraFile, options: ReadOptions, base: BaseModel | None) -> Survey:
    """Survey an open file.

    Raises:
        LoraError: the file is not a LoRA.
    """
    where = named(file.path)
    if ARTIFACT_KEY in file.metadata:
        raise LoraError(
            f"{where} is a klora artifact already. Compile the LoRAs that it was made from, or "
            "apply it."
        )
    scales = Scales(file.metadata, file.config, where)
    if not file.tensors:
        raise LoraError(f"{where} holds no tensors.")
    shapes = {key: info.shape for key, info in file.tensors.items()}
    stated = options.family or stated_family(file.metadata)
    account = account_for(shapes, stated)
    describer = Describer(file, account, scales, options, base)
    pieces: list[Piece] = []
    problems = list(account.problems)
    for module in account.modules:
        described = describer.describe(module)
        pieces += described.pieces
        problems += [f"{shown(module.name)}: {problem}" for problem in described.problems]
    layers, twice = _layers_of(pieces, options)
    problems += twice
    problems += _without_layers(account)
    axis = file_axis(pieces)
    if isinstance(axis, str):
        problems.append(axis)
    found = families_of_layers(layers.values(), account.families)
    if stated is not None and not found:
        having = families_having(layers.values())
        if stated in having or (options.family is not None and not having):
            found = (stated,)
        else:
            found = tuple(sorted(having)) if options.family is not None else ()
    if options.family is not None and found and options.family not in found:
        problems.append(
            f"its layers are those of {families_name(found)}, and not of "
            f"{family_name(options.family)} as --family says"
        )
    found = (stated,) if stated in found else _by_trainer(found, account.layout)
    return Survey(
        path=file.path,
        nbytes=file.size,
        layout=account.layout,
        names=account.names,
        family=found[0] if len(found) == 1 else None,
        families=found,
        origin=origin_of(file),
        keys=len(file.tensors),
        unused=account.unused,
        layers=tuple(layers[name] for name in sorted(layers)),
        pieces=tuple(pieces),
        axis=None if isinstance(axis, str) else axis,
        problems=tuple(problems),
    )


def _layers_of(
    pieces: Sequence[Piece], options: ReadOptions
) -> tuple[dict[str, LayerFacts], list[str]]:
    """Return name -> layer, and one sentence for each layer that the file has twice."""
    layers: dict[str, LayerFacts] = {}
    modules: dict[str, str] = {}
    twice: list[str] = []
    for piece in pieces:
        for facts in piece.layers:
            name = facts.name
            if name in layers:
                twice.append(
                    f"{shown(piece.module.name)}: the file has {shown(name)} twice, here and "
                    f"in {shown(modules[name])}; keep one of them"
                )
            layers[name], modules[name] = facts, piece.module.name
    named = options.denoiser
    if twice and named and any(piece.module.name.startswith(f"{named}.") for piece in pieces):
        twice = [
            f"the file changes {named} itself, so it needs neither --denoiser {named} nor "
            "--both-denoisers; leave the option out"
        ]
    return layers, twice


def _by_trainer(families: tuple[str, ...], layout: str) -> tuple[str, ...]:
    """Return the one family that kohya's trainers train, for a file in their spelling."""
    known = {key: FAMILIES[key] for key in families if key in FAMILIES}
    trained = tuple(key for key, family in known.items() if family.kohya is not None)
    return trained if layout == "kohya" and len(trained) == 1 else families


def refusal(found: Survey, options: ReadOptions) -> LoraError | None:
    """Return why a LoRA cannot be compiled with these options; None if it can."""
    where = named(found.path)
    may_ignore = not any(each.is_of_used for each in found.unused)
    ignores = may_ignore and options.ignore_unknown and (found.layers or found.problems)
    if found.unused and not ignores:
        return _unusable(where, found)
    if found.problems:
        return problematic(found.path, found.problems)
    if not found.layers:
        return LoraError(f"{where} changes no layer.")
    if found.needs_base and options.base is None:
        needing = {p.module.name: p.facts.form for p in found.pieces if p.needs_base}
        count, forms = _count(list(needing), "module"), ", ".join(sorted(set(needing.values())))
        return LoraError(
            f"{where}: the base model's weights are needed for {count} of the form {forms}. Name "
            "the base model with --base PATH (a diffusers folder or one safetensors file).",
            [shown(layer) for layer in needing],
        )
    return None


def problematic(path: Path, problems: Sequence[str]) -> LoraError:
    """Return the error for a file with these problems."""
    count = _count(problems, "reason")
    return LoraError(f"{named(path)}: cannot be used as it is, for {count}.", problems)


def _unusable(where: str, found: Survey) -> LoraError:
    of_used = sum(each.is_of_used for each in found.unused)
    advice = ", or leave them out with --ignore-unknown."
    if of_used:
        advice = (
            f". {of_used} of them are parts of layers that mean something else without them; "
            "--ignore-unknown does not leave these out."
        )
    return LoraError(
        f"{where}: {len(found.unused)} of {found.keys} keys cannot be used, and klora reads a file "
        f"whole or not at all. Convert it to diffusers/PEFT keys{advice}",
        [f"{shown(each.key)}: {each.why}" for each in found.unused],
    )


def _count(things: Sequence[object], word: str) -> str:
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"
