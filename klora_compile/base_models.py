"""Base models as users name them: a folder, a file, or a name on the Hugging Face Hub."""

from __future__ import annotations

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
    return kept_name(path) or path.resolve().name


def downloaded(address: Address) -> Path:
    """Return the folder of a pipeline on the Hub, as diffusers downloads it.

    The revision is resolved once, so all files come from one commit, which is in the path.

    Raises:
        ConfigError: the repository holds no pipeline.
        KloraError: the Hub does not give it, or diffusers is not installed.
    """
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise missing_library(f"the base model {address}", error) from error
    index = fetch(replace(address, file=INDEX), MODEL)
    origin = origin_of(index)
    assert origin is not None  # it is in the cache
    loader: Any = diffusers.DiffusionPipeline
    try:
        return Path(loader.download(address.repo, revision=origin.commit))
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # of a broken index
        text = shown(" ".join(str(error).split()) or type(error).__name__, limit=500)
        raise KloraError(
            f"diffusers cannot download {address}: {text if text.endswith('.') else f'{text}.'}"
        ) from error
    except Exception as error:  # from the network, the Hub or the cache
        root = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise sentence(library(str(address)), address, root) from error
