"""Base models as users name them: a folder, a file, or a name on the Hugging Face Hub."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from klora_compile.extras import missing_library
from klora_runtime.errors import KloraError, shown
from klora_runtime.hub.address import Address, address_of
from klora_runtime.hub.choosing import MODEL
from klora_runtime.hub.fetching import fetch, kept_name, library, origin_of, sentence

#: The file of a folder of diffusers that lists the pipeline's parts.
INDEX = "model_index.json"


def model_path(name: str | os.PathLike[str]) -> Path:
    """Return the path of a base model, after downloading it if it is named on the Hub.

    Args:
        name: a folder of diffusers, a safetensors file, or a name on the Hub of either.

    Raises:
        KloraError: the Hub gives no such model.
    """
    address = address_of(name)
    if address is None:
        return Path(name)
    return downloaded(address) if address.file is None else fetch(address, MODEL)


def model_name(path: Path) -> str:
    """Return how files name a base model: without folders, or its name and commit on the Hub."""
    return kept_name(path) or Path(os.path.abspath(path)).name


def downloaded(address: Address, *, trust_remote_code: bool = False) -> Path:
    """Return the folder of a pipeline on the Hub, as diffusers downloads it.

    The revision is resolved once, so all files come from one commit, which is in the path.

    Args:
        address: the repository.
        trust_remote_code: whether diffusers may run the Python file of the pipeline, to see which
            parts it needs.

    Raises:
        ConfigError: the repository holds no pipeline.
        KloraError: the Hub does not give it, it has a Python file and is not trusted, or diffusers
            is not installed.
    """
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise missing_library(f"the base model {address}", error) from error
    index = fetch(replace(address, file=INDEX), MODEL)
    origin = origin_of(index)
    assert origin is not None  # it is in the cache
    own = _own_pipeline(replace(address, revision=origin.commit), index)
    if own is not None and not trust_remote_code:
        raise KloraError(
            f"{address} brings Python code of its own ({own}.py), which would run on this machine. "
            "Read it, and add --trust-remote-code to klora sample if you trust it; for --base, "
            "download the repository and name its folder."
        )
    loader: Any = diffusers.DiffusionPipeline
    try:
        return Path(
            loader.download(
                address.repo,
                revision=origin.commit,
                custom_pipeline=own,
                trust_remote_code=trust_remote_code,
            )
        )
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # of a broken index
        text = shown(" ".join(str(error).split()) or type(error).__name__, limit=500)
        raise KloraError(
            f"diffusers cannot download {address}: {text if text.endswith('.') else f'{text}.'}"
        ) from error
    except Exception as error:  # from the network, the Hub or the cache
        root = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise sentence(library(str(address)), address, root) from error


def read_index(path: Path, model: str) -> dict[str, Any]:
    """Return what the ``model_index.json`` of a folder says.

    Args:
        path: the file.
        model: what the user called the model.

    Raises:
        KloraError: it is no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise KloraError(
            f"{INDEX} of {shown(model)} cannot be read: {shown(error)}. Get the folder again."
        ) from error
    if not isinstance(found, dict):
        raise KloraError(f"{INDEX} of {shown(model)} is no JSON object. Get the folder again.")
    return found


def _own_pipeline(address: Address, index: Path) -> str | None:
    """Return the module with a pipeline's class in a repository; None if diffusers has it."""
    from klora_compile.own_code import PIPELINE, is_unknown, named_module

    read = read_index(index, str(address))
    module = named_module(read)
    if module is None and is_unknown(read):
        module = PIPELINE.removesuffix(".py")
    if module is not None:
        fetch(replace(address, file=f"{module}.py"), MODEL)  # it is there
    return module
