"""Upload of an artifact to the Hugging Face Hub, with its card and pictures, in one commit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klora_runtime.errors import KloraError, shown
from klora_runtime.hub.address import Address, endpoint
from klora_runtime.hub.fetching import library, sentence

#: Name of a card in a repository.
CARD = "README.md"


@dataclass(frozen=True)
class Upload:
    """The files of one commit."""

    repo: str
    """``OWNER/NAME``."""
    files: Mapping[str, Path | bytes]
    """Path in the repository -> the file, or its contents."""

    def sizes(self) -> dict[str, int]:
        """Return path in the repository -> bytes."""
        return {
            name: len(data) if isinstance(data, bytes) else data.stat().st_size
            for name, data in self.files.items()
        }


def upload(what: Upload, *, private: bool, replace_card: bool) -> str:
    """Make the repository if it is missing, and upload the files in one commit.

    Args:
        what: the files.
        private: whether a new repository is private.
        replace_card: whether a card that is there already may be replaced.

    Returns:
        The address of the commit.

    Raises:
        KloraError: the repository has a card already, or the Hub cannot be reached or refuses.
    """
    hub = library(what.repo)
    api = hub.HfApi(endpoint=endpoint())
    try:
        there = api.repo_exists(what.repo)
        taken = there and api.file_exists(what.repo, CARD)
    except Exception as error:  # from the network, in the types of several libraries
        raise sentence(hub, Address(what.repo), error) from error
    if taken and not replace_card:
        raise KloraError(
            f"{what.repo} has a {CARD} already. Add --force to replace it, or name another "
            "repository."
        )
    try:
        if not there:
            api.create_repo(what.repo, private=private)
        operations: list[Any] = [
            hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=data)
            for name, data in what.files.items()
        ]
        names = [name for name in what.files if name != CARD]
        done = api.create_commit(
            what.repo, operations, commit_message=f"Add {shown(names[0])}, fused by klora"
        )
    except Exception as error:  # from the network, in the types of several libraries
        raise sentence(hub, Address(what.repo), error) from error
    return str(done.commit_url)
