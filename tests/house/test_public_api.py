"""Which names are public, and that they are enough to annotate and to catch what they give."""

from __future__ import annotations

import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

import pytest
import torch

from klora_compile.rules.rule import Rule

#: Everything that is public, exactly. Whoever adds a name here promises to keep it.
PUBLIC: dict[str, list[str]] = {
    "klora_compile": [
        "Adapter",
        "ConfigError",
        "Fusion",
        "Halves",
        "KloraError",
        "LoraError",
        "OwnPictures",
        "PairingError",
        "ReadOptions",
        "Settings",
        "calibrate_fusion",
        "compile_fusion",
        "compress",
        "drop_unused",
        "read_adapter",
        "reschedule",
        "thin",
        "verify_fusion",
    ],
    "klora_compile.export": [
        "ExportSettings",
        "Exported",
        "ExportedPhases",
        "export_phases",
        "export_static",
    ],
    "klora_compile.rules": [
        "Auto",
        "AutoStrength",
        "Dare",
        "Della",
        "Direct",
        "Est",
        "Fitted",
        "Groups",
        "Klora",
        "Level",
        "NpKlora",
        "NpLora",
        "Phases",
        "Rule",
        "Soft",
        "Ssr",
        "Switch",
        "Ties",
    ],
    "klora_compile.searching": ["About", "Check", "Interval", "Scored", "Search", "search"],
    "klora_compile.sweeping": ["Sweep", "SweptCell", "sweep"],
    "klora_runtime": [
        "ArtifactError",
        "Catalogue",
        "ConfigError",
        "Fusion",
        "FusionHandle",
        "FusionLibrary",
        "InUseError",
        "IncompatibleModelError",
        "KloraError",
        "Report",
        "apply_fusion",
        "load_fusion",
        "save_fusion",
    ],
}

#: What of a rule is for its users; the rest is for the compiler, and for who writes a rule.
OF_RULES = {"parameters", "from_parameters"}

#: A function of each package that gives a fusion or takes one, and an error that it lists.
LISTED = {
    "klora_compile": ("compile_fusion", "PairingError"),
    "klora_compile.export": ("export_static", "KloraError"),
    "klora_runtime": ("apply_fusion", "InUseError"),
}


def public(package: str) -> dict[str, Any]:
    return {name: getattr(importlib.import_module(package), name) for name in PUBLIC[package]}


def at_hand(package: str) -> dict[str, Any]:
    """The public names of a package and of the rooms beside it in the same distribution."""
    distribution = package.partition(".")[0]
    rooms = [each for each in PUBLIC if each.partition(".")[0] == distribution]
    return {name: value for each in rooms for name, value in public(each).items()}


def callables_of(value: Any) -> Iterator[Any]:
    """A function; of a class its methods and the getters of its properties, inherited ones too."""
    if not isinstance(value, type):
        yield value
        return
    # The fields of a dataclass are read; nobody has to name their types.
    made_by = None if is_dataclass(value) else "__init__"
    for name, member in inspect.getmembers_static(value):
        if name.startswith("_") and name != made_by:
            continue
        if issubclass(value, Rule) and name not in OF_RULES:
            continue
        if isinstance(member, property):
            yield member.fget
        elif inspect.isfunction(member):
            yield member


def classes_in(hint: Any) -> Iterator[type]:
    """Every class that an annotation mentions."""
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias):
        yield hint
    for part in typing.get_args(hint):
        yield from classes_in(part)


def raised(docstring: str | None) -> set[str]:
    """Names of the errors that a docstring's section ``Raises`` lists."""
    section = re.search(r"^( *)Raises:\n((?:\1 +.*\n|\n)*)", f"{docstring}\n", re.MULTILINE)
    if section is None:
        return set()
    return set(re.findall(rf"^{section[1]}    (\w+): ", section[2], re.MULTILINE))


@pytest.mark.parametrize("package", PUBLIC)
def test_the_public_names_are_exactly_these(package: str) -> None:
    module = importlib.import_module(package)
    assert sorted(module.__all__) == PUBLIC[package] == sorted(PUBLIC[package])
    assert set(PUBLIC[package]) <= set(dir(module))
    for name, value in public(package).items():
        assert value.__name__ == name
        assert value.__module__.startswith("klora_")
        summary = (value.__doc__ or "").splitlines()[0]
        assert re.fullmatch(r"[A-Z].*\.", summary), f"{name}: {summary}"
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = module.nothing


@pytest.mark.parametrize("package", LISTED)
def test_types_that_public_signatures_mention_are_public(package: str) -> None:
    names = at_hand(package)
    mentioned: dict[str, set[type]] = {}
    for name, value in names.items():
        for function in callables_of(value):
            for hint in typing.get_type_hints(function, localns={"torch": torch, **names}).values():
                own = {c for c in classes_in(hint) if c.__module__.startswith("klora")}
                mentioned.setdefault(name, set()).update(own)
    assert names["Fusion"] in mentioned[LISTED[package][0]]
    assert set().union(*mentioned.values()) <= set(names.values())


@pytest.mark.parametrize("package", LISTED)
def test_errors_that_public_docstrings_list_are_public(package: str) -> None:
    names = at_hand(package)
    listed: dict[str, set[str]] = {}
    for name, value in names.items():
        documented = [value, *callables_of(value)]
        listed[name] = set().union(*(raised(inspect.getdoc(each)) for each in documented))
    function, error = LISTED[package]
    assert error in listed[function]
    assert set().union(*listed.values()) <= set(names)
    errors = {name for name in names if name.endswith("Error")} - {"KloraError"}
    assert errors <= set().union(*listed.values()), "an error that nothing raises"


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_function_documents_its_arguments(package: str) -> None:
    for name, value in public(package).items():
        for function in callables_of(value):
            if function.__name__ in ("__init__", "__enter__", "__exit__"):
                continue
            text = inspect.getdoc(function)
            assert text, f"{name}.{function.__name__}"
            given = [each for each in inspect.signature(function).parameters if each != "self"]
            told = r"^ *{}: |`{}`"
            missing = [g for g in given if not re.search(told.format(g, g), text, re.MULTILINE)]
            assert not missing, f"{name}.{function.__name__}: {missing}"
