"""Base models as users name them: a folder, a file, or a name on the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from klora_compile.extras import missing_library
from klora_runtime.errors import KloraError, shown
from klora_runtime.hub.address import Address, address_of
from klora_runtime.hub.choosing import MODEL
from klora_runtime.hub.fetching import fetch


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


def model_name(name: str | os.PathLike[str]) -> str:
    """Return how an artifact names a base model: without folders, or its name on the Hub."""
    address = address_of(name)
    return Path(name).resolve().name if address is None else str(address)


def downloaded(address: Address) -> Path:
    """Return the folder of a pipeline on the Hub, as diffusers downloads it."""
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise missing_library(f"the base model {address}", error) from error
    loader: Any = diffusers.DiffusionPipeline
    try:
        return Path(loader.download(address.repo, revision=address.revision))
    except Exception as error:  # from the network, the Hub or the cache
        root = error.__cause__ or error
        text = shown(" ".join(str(root).split()) or type(root).__name__, limit=500)
        raise KloraError(
            f"there is no folder {shown(address.repo)}, and the Hub gives no model of that name: "
            f"{type(root).__name__}: {text if text.endswith(('.', '…')) else f'{text}.'}"
        ) from error
