"""The account of a file's keys: each is a part of a module, or unused for a reason."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from klora_compile.reading.files.whole_models import token_embedding
from klora_compile.reading.forms.catalogue import MAGNITUDES, form_of, shared_part
from klora_compile.reading.forms.parts import Form, Header, Part, Shape
from klora_compile.reading.names.keys import (
    NamedModule,
    ParsedKey,
    PlacedModule,
    RefusedKey,
    UnplacedModule,
    names_adapter,
    parse_key,
)
from klora_compile.reading.names.placing import (
    Choice,
    choose,
    component_of,
    fits,
    in_authors_names,
)
from klora_compile.reading.names.spelling import PEFT_ROOT
from klora_runtime.errors import shown
from klora_runtime.families.catalogue import FAMILIES
from klora_runtime.families.family import Family, TextEncoder
from klora_runtime.families.rows import Layout

_EMBEDDING = (
    "is an embedding of tokens, which klora does not carry; load it beside the fusion with "
    "pipe.load_textual_inversion"
)


@dataclass(frozen=True)
class Module:
    """A module of a file and the keys of its parts."""

    key: NamedModule
    parts: Mapping[Part, str]
    form: Form | str | None
    """See :func:`~klora_compile.reading.forms.catalogue.form_of`."""

    @property
    def name(self) -> str:
        """Name in messages."""
        return self.key.layer


@dataclass(frozen=True)
class UnusedKey:
    """A key that klora cannot use."""

    key: str
    why: str
    is_of_used: bool = False
    """Whether it belongs to a module whose other parts are used and change their meaning without
        it."""


@dataclass(frozen=True)
class Account:
    """The account of a file's keys."""

    modules: tuple[Module, ...]
    """Sorted by name."""
    table: Layout | None
    """Table for modules in the authors' names; None if there are no such modules."""
    families: frozenset[str]
    """Families of all tables that agree with it."""
    with_encoders: tuple[str, ...]
    """Those of the families that have all text encoders of the file, in the catalogue's order; all
    families if none has them."""
    shared: Mapping[Part, str]
    """Part -> key of tensors that the file has once for all modules."""
    unused: tuple[UnusedKey, ...]
    """Unused keys, in the order of the keys."""
    problems: tuple[str, ...]
    """Contradictions between keys; a file with any is always refused."""

    @property
    def layout(self) -> str:
        """``peft`` or ``kohya``, joined by ``+`` if mixed; or the table's name for its files."""
        if self.table is not None and self.table.spelling is not None:
            return self.table.spelling
        return "+".join(sorted({module.key.layout for module in self.modules}))

    @property
    def names(self) -> str:
        """Naming of the denoiser's modules: ``diffusers``, or its authors', such as ``bfl``."""
        return "diffusers" if self.table is None else self.table.name

    def place(self, module: Module) -> tuple[str, str]:
        """Return component and path of a module, with the file's own path if a table places it."""
        if isinstance(module.key, UnplacedModule):
            assert self.table is not None
            return component_of(self.table, module.key.stem), module.key.stem.name
        key, encoder = module.key, self._text_encoder(module.key)
        if encoder is None:
            return key.component, key.module
        return encoder.component, encoder.model.home(key.written) or key.module

    def _text_encoder(self, key: PlacedModule) -> TextEncoder | None:
        """Return the text encoder that a key belongs to, or None."""
        if self.table is None or key.prefix is None:
            return None
        for family in self.with_encoders:
            found = _encoder_of(FAMILIES[family], key)
            if found is not None:
                return found
        own = FAMILIES.get(self.table.family)
        return None if own is None else own.encoder(key.prefix)


def _encoder_of(family: Family, key: PlacedModule) -> TextEncoder | None:
    """Return the family's text encoder that a key belongs to, or None.

    VideoX-Fun writes one prefix for all text encoders; it then means the family's text encoder
    that has the module.
    """
    named = None if key.prefix is None else family.encoder(key.prefix)
    having = [e for e in family.text_encoders if e.model.home(key.written) is not None]
    if named in having or (named is None and len(having) == 1):
        return named or having[0]
    return None


def _with_encoders(choice: Choice, modules: Sequence[Module]) -> tuple[str, ...]:
    """Return :attr:`Account.with_encoders`."""
    own = set() if choice.table is None else {choice.table.family, *choice.families}
    families = [key for key in FAMILIES if key in own]
    keys = [m.key for m in modules if isinstance(m.key, PlacedModule) and m.key.prefix is not None]
    having = [f for f in families if all(_encoder_of(FAMILIES[f], key) for key in keys)]
    return tuple(having or families)


def _text_problems(families: Sequence[str], modules: Sequence[Module]) -> Iterator[str]:
    """Yield a problem for each module that two families have in different text encoders."""
    for module in modules:
        if not isinstance(module.key, PlacedModule) or module.key.prefix is None:
            continue
        found = {f: _encoder_of(FAMILIES[f], module.key) for f in families}
        places = {f: encoder.component for f, encoder in found.items() if encoder is not None}
        named = {f for f in places if FAMILIES[f].encoder(module.key.prefix) is not None}
        if named == set(places):  # one trainer's names; the first family is meant
            continue
        if len(set(places.values())) > 1:
            said = ", ".join(f"{component} of {f}" for f, component in places.items())
            yield (
                f"{shown(module.name)}: is ambiguous: it may be of {said}; name the base model "
                "with --family, or as modelspec.architecture in the file's metadata"
            )


def account_for(shapes: Mapping[str, Shape], family: str | None = None) -> Account:
    """Parse all keys of a file.

    Args:
        shapes: key -> shape of its tensor.
        family: the base model's family that the file states; it decides if names and widths do not.
    """
    keys = sorted(shapes)
    why: dict[str, str] = {}
    parsed: dict[str, ParsedKey] = {}
    refused: dict[str, str] = {}
    shared: dict[Part, str] = {}
    named: dict[str, NamedModule | str] = {}
    for key in keys:
        once = shared_part(key.removeprefix(PEFT_ROOT))
        if once is not None:
            shared[once] = key
            continue
        found = _EMBEDDING if token_embedding(key) else parse_key(key, shapes, named)
        if isinstance(found, str):
            why[key] = found
        elif isinstance(found, RefusedKey):
            why[key] = _refusal(found.form)
            refused[found.raw] = found.form
        else:
            parsed[key] = found
    for key in [key for key, each in parsed.items() if each.module.raw in refused]:
        why[key] = _refusal(refused[parsed.pop(key).module.raw])
    by_raw = {each.module.raw: each.module for each in parsed.values()}
    used = set(by_raw)
    modules, problems = _modules(parsed, dict(_for_tables(by_raw)))
    choice = _choice(modules, shapes, family)
    strangers = [m for m in modules if _stem_in(m, choice.strangers)]
    for module in strangers:
        assert isinstance(module.key, UnplacedModule)
        why |= dict.fromkeys(module.parts.values(), choice.strangers[module.key.stem])
        used.discard(module.key.raw)
    for module in modules:
        if _stem_in(module, choice.ambiguous):
            assert isinstance(module.key, UnplacedModule)
            said = choice.ambiguous[module.key.stem]
            problems += [f"{shown(key)}: {said}" for key in module.parts.values()]
    with_encoders = _with_encoders(choice, modules)
    problems += _text_problems(with_encoders, modules)
    problems += _adapter_problems(choice.table, modules)
    return Account(
        with_encoders=with_encoders,
        modules=tuple(m for m in modules if not _stem_in(m, choice.strangers)),
        table=choice.table,
        families=choice.families,
        shared=shared,
        unused=tuple(UnusedKey(key, why[key], _is_of(key, used)) for key in keys if key in why),
        problems=tuple(problems),
    )


def _adapter_problems(table: Layout | None, modules: Sequence[Module]) -> Iterator[str]:
    """Yield a problem for each module with an adapter name that the table refuses."""
    why = None if table is None else table.without_adapters
    for module in modules if why is not None else ():
        keys = [key for key in module.parts.values() if names_adapter(key)]
        if keys and isinstance(module.key, UnplacedModule):
            yield f"{shown(keys[0])}: {why}"


def _is_of(key: str, modules: Collection[str]) -> bool:
    """Return whether a key belongs to one of these modules, with any ending."""
    parts = key.split(".")
    return any(".".join(parts[:count]) in modules for count in range(1, len(parts)))


def _refusal(form: str) -> str:
    return f"is part of {form}, which klora does not read"


def _for_tables(by_raw: Mapping[str, NamedModule]) -> Iterator[tuple[str, NamedModule]]:
    """Yield the modules; a denoiser's go to one table if some must, or if a table has them all.

    Args:
        by_raw: modules by their keys without endings.
    """
    having = [each for each in by_raw.values() if each.stem is not None]
    stated = {each.stem for each in having if each.stem is not None and _is_stated(each)}
    stems = {each.stem for each in having if each.stem is not None} - stated
    flat = any(isinstance(each, UnplacedModule) and each.stem.flat for each in having)
    dotted = any(not stem.flat for stem in stems)
    for_tables = flat or (dotted and fits(stems))
    renamed = bool(stated) and in_authors_names(stated)
    for raw, each in by_raw.items():
        moved = renamed if _is_stated(each) else for_tables
        if moved and isinstance(each, PlacedModule) and each.stem is not None:
            yield raw, UnplacedModule(each.layout, each.stem, raw)
        else:
            yield raw, each


def _is_stated(module: NamedModule) -> bool:
    """Return whether the file names the component, which suggests diffusers' names."""
    return isinstance(module, PlacedModule) and module.stated


def _modules(
    parsed: Mapping[str, ParsedKey], by_raw: Mapping[str, NamedModule]
) -> tuple[list[Module], list[str]]:
    """Return the modules, sorted by name, and problems of duplicate tensors."""
    layers = {raw: module.layer for raw, module in by_raw.items()}
    named: dict[str, NamedModule] = {}
    for raw, layer in layers.items():
        named.setdefault(layer, by_raw[raw])
    parts: dict[str, dict[Part, str]] = {layer: {} for layer in named}
    problems = []
    for key, (module, part) in parsed.items():
        layer = layers[module.raw]
        own = parts[layer]
        if part in own:
            problems.append(
                f"{shown(key)}: is a second {part.name} of {shown(layer)}, beside "
                f"{shown(own[part])}"
            )
        own[part] = key
        if part in MAGNITUDES and all(each in own for each in MAGNITUDES):
            problems.append(f"{shown(key)}: is a second magnitude of {shown(layer)}")
    found = [Module(named[n], parts[n], form_of(parts[n])) for n in sorted(named)]
    return found, problems


def _choice(modules: Sequence[Module], shapes: Mapping[str, Shape], family: str | None) -> Choice:
    stems = {
        module.key.stem: _rows_and_columns(module, shapes)
        for module in modules
        if isinstance(module.key, UnplacedModule)
    }
    return choose(stems, family) if stems else Choice(None)


def _rows_and_columns(module: Module, shapes: Mapping[str, Shape]) -> tuple[int, int] | None:
    """Return rows and columns of a module's weight; None if its parts do not show them."""
    form = module.form
    own = {part: shapes[key] for part, key in module.parts.items()}
    if form is None or isinstance(form, str) or form.problems(Header(own)):
        return None
    shape = form.shape(Header(own))
    return None if shape is None or len(shape) < 2 else (shape[0], shape[1])


def _stem_in(module: Module, stems: Collection[object]) -> bool:
    return isinstance(module.key, UnplacedModule) and module.key.stem in stems
