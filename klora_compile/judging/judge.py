"""Judges by name, and the check of what they answer."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from PIL import Image

from klora_runtime.errors import ConfigError, KloraError, shown


@dataclass(frozen=True)
class About:
    """What a judge is told about a picture."""

    prompt: str
    """What the picture should show."""
    seed: int
    settings: Mapping[str, Any]
    """Settings of the fusion by full name, such as ``{"rule": "klora", "weight.style": 0.8}``."""
    own: Mapping[str, tuple[Image.Image, ...]] = field(default_factory=dict)
    """Slot -> pictures of that LoRA alone with its own prompts; empty if no prompts are known. All
        candidates are compared with these, so a judge leaves them as they are."""


#: A picture, or the middle frame of a video, and what is known of it -> how good it is. Any finite
#: number; higher is better. Equal pictures should get equal numbers.
Judge: TypeAlias = Callable[[Image.Image, About], float]

#: Name of the judge that comes with klora: similarity to each LoRA's own pictures.
OWN_PICTURES = "own-pictures"


def judge_named(name: str) -> Judge:
    """Return a judge.

    Args:
        name: ``own-pictures``, ``MODULE:FUNCTION`` of a module that can be imported, or
            ``FILE.py:FUNCTION``. Its code runs on this machine.

    Raises:
        ConfigError: there is no such judge.
        KloraError: its module cannot be imported, or its networks are not installed.
    """
    if name == OWN_PICTURES:
        from klora_compile.judging.own_pictures import OwnPicturesJudge

        return OwnPicturesJudge.with_packages()
    where, sign, function = name.rpartition(":")
    if not sign or not where or not function:
        raise ConfigError(
            f"judge: expected {OWN_PICTURES}, MODULE:FUNCTION or FILE.py:FUNCTION, found "
            f"{shown(name)!r}."
        )
    found = getattr(_module(where), function, None)
    if not callable(found):
        raise ConfigError(
            f"judge: {shown(where)} has no function {shown(function)}; name one that takes a "
            "picture and what is known of it."
        )
    judge: Judge = found
    return judge


def name_of(judge: Judge | str) -> str:
    """Return the name of a judge, for errors and results."""
    if isinstance(judge, str):
        return judge
    return str(getattr(judge, "__name__", type(judge).__name__))


def verdict(judge: Judge, name: str, picture: Image.Image, about: About, which: str) -> float:
    """Return what a judge says of a picture.

    Args:
        judge: the judge.
        name: its name, for errors.
        picture: the picture.
        about: what it is told.
        which: which picture it is, for errors.

    Raises:
        KloraError: the judge raises, or answers something else than a finite number.
    """
    where = f"the judge {shown(name)} failed at {shown(which)}, seed {about.seed}"
    try:
        found = judge(picture, about)
    except KloraError:
        raise
    except (Exception, SystemExit) as error:  # a judge may raise anything, and may exit
        text = shown(" ".join(str(error).split()) or "no reason", limit=300)
        raise KloraError(
            f"{where}: it raised {type(error).__name__}: {text}. Mend the judge; the pictures are "
            "kept."
        ) from error
    if isinstance(found, bool) or not isinstance(found, Real) or not math.isfinite(_float(found)):
        raise KloraError(
            f"{where}: expected a finite number, found {shown(repr(found), limit=100)}. Let the "
            "judge return a float."
        )
    return float(found)


def _float(number: Real) -> float:
    """Return a number as a float; infinity for one that is too large for it."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _module(where: str) -> ModuleType:
    """Import a module by its name, or from a file."""
    try:
        return _from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except (Exception, SystemExit) as error:  # what it imports may raise anything, and may exit
        text = shown(" ".join(str(error).split()), limit=300)
        raise KloraError(
            f"the judge's module {shown(where)} cannot be imported: {type(error).__name__}: {text}."
        ) from error


def _from_file(path: Path) -> ModuleType:
    name = f"klora_judge_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # the file's name ends with .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickles look for it
    spec.loader.exec_module(module)
    return module
