"""Downloads from the Hugging Face Hub by huggingface_hub, with its cache, tokens and settings."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from klora_runtime.errors import ConfigError, KloraError, shown
from klora_runtime.hub.address import Address, address_of, endpoint, shown_endpoint
from klora_runtime.hub.choosing import Kind, choose, listed

#: Where huggingface_hub keeps a repository or a file: models--OWNER--NAME/snapshots/COMMIT/FILE.
_KEPT = re.compile(
    r"/models--(?P<owner>[^/]+?)--(?P<name>[^/]+?)/snapshots/(?P<commit>[0-9a-f]{40})"
    r"(?:/(?P<file>.+))?$"
)


@dataclass(frozen=True)
class Origin:
    """The place of a file on the Hub."""

    repo: str
    """``OWNER/NAME``."""
    file: str
    """Path in the repository."""
    commit: str
    """40 hexadecimal digits."""

    def __str__(self) -> str:
        """Return the name of this version of the file."""
        return f"hf://{self.repo}@{self.commit}/{self.file}"

    def notes(self) -> dict[str, str]:
        """Return the origin as JSON values, for a source of an artifact."""
        return {"repo": self.repo, "file": self.file, "commit": self.commit}

    @classmethod
    def of_notes(cls, notes: Mapping[str, Any]) -> Origin | None:
        """Return the origin that a source of an artifact states; None if it states none."""
        stated = notes.get("hub")
        if not isinstance(stated, Mapping):
            return None
        repo, file, commit = (stated.get(key) for key in ("repo", "file", "commit"))
        if not (isinstance(repo, str) and isinstance(file, str) and isinstance(commit, str)):
            return None
        return cls(repo, file, commit)


@dataclass(frozen=True)
class _Repository:
    """A repository at one commit."""

    commit: str
    files: Sequence[str]
    is_online: bool
    """Whether the Hub said so; else it is what the cache has."""


def located(
    name: str | os.PathLike[str], kind: Kind, weight_name: str | None = None
) -> str | os.PathLike[str]:
    """Return the path of a file, after downloading it if the name is one on the Hub.

    Args:
        name: a path, or a name on the Hub; see :func:`~klora_runtime.hub.address.address_of`.
        kind: what the file is, to choose it where the name is of a repository.
        weight_name: path of the file in the repository.

    Returns:
        The path: ``name`` itself if it is a path, else a path in the cache of huggingface_hub,
        which :func:`origin_of` understands.

    Raises:
        ConfigError: the name or ``weight_name`` names no file, or the repository has several.
        KloraError: the Hub cannot be reached, refuses, or has no such repository; or
            huggingface_hub is not installed.
    """
    address = address_of(name)
    if address is None:
        if weight_name is not None:
            raise ConfigError(
                f"weight_name {shown(weight_name)}: {shown(name)} is a path, and only a repository "
                "on the Hub needs it; leave it out."
            )
        return name
    if weight_name is not None:
        if address.file not in (None, weight_name):
            raise ConfigError(
                f"weight_name {shown(weight_name)}: {shown(name)} names a file already; leave one "
                "of them out."
            )
        address = replace(address, file=weight_name)
    return fetch(address, kind)


def fetch(address: Address, kind: Kind) -> Path:
    """Download a file, or take it from the cache, and return its path there.

    The revision is resolved once, so all files come from one commit.

    Raises:
        ConfigError: the repository has no such file, or several that may be meant.
        KloraError: see :func:`located`.
    """
    hub = library(str(address))
    repository = _look_up(hub, address)
    file = address.file or choose(address.repo, repository.files, kind)
    if repository.is_online and file not in repository.files:
        raise ConfigError(
            f"{address.repo} has no file {shown(file)}; found {listed(repository.files)}. Name "
            "another file."
        )
    folder, slash, own = file.rpartition("/")
    wanted = [file, *(f"{folder}{slash}{each.replace('*', own)}" for each in kind.beside)]
    paths = [
        _download(hub, address, repository, each)
        for each in wanted
        if each == file or each in repository.files
    ]
    return paths[0]


def origin_of(path: Path) -> Origin | None:
    """Return where a file comes from if it lies in the cache of huggingface_hub."""
    found = _KEPT.search(path.absolute().as_posix())
    if found is None or found["file"] is None:
        return None
    return Origin(f"{found['owner']}/{found['name']}", found["file"], found["commit"])


def kept_name(path: Path) -> str | None:
    """Return the name on the Hub of this version of a file or a whole repository in the cache."""
    found = _KEPT.search(path.absolute().as_posix())
    if found is None:
        return None
    return str(Address(f"{found['owner']}/{found['name']}", found["file"], found["commit"]))


def library(name: str) -> Any:
    """Return huggingface_hub, or say that a name needs it."""
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise KloraError(
            f"{shown(name)} is on the Hub, and huggingface_hub is not installed. Install it: pip "
            "install huggingface_hub"
        ) from error
    return huggingface_hub


def _look_up(hub: Any, address: Address) -> _Repository:
    """Return the repository at the address's revision, or as the cache has it."""
    try:
        info = hub.HfApi(endpoint=endpoint()).model_info(address.repo, revision=address.revision)
        return _Repository(info.sha, sorted(each.rfilename for each in info.siblings), True)
    except Exception as error:  # from the network, in the types of several libraries
        if _is_answer(hub, error):
            raise sentence(hub, address, error) from error
        try:
            kept = hub.snapshot_download(
                address.repo,
                revision=address.revision,
                local_files_only=True,
                allow_patterns=[],  # it refuses a folder that lacks a file of the patterns
            )
        except Exception:  # the cache lacks it
            raise sentence(hub, address, error) from error
    folder = Path(kept)
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return _Repository(folder.name, files, False)


def _download(hub: Any, address: Address, repository: _Repository, file: str) -> Path:
    def at(revision: str | None) -> Path:
        return Path(
            hub.hf_hub_download(
                address.repo,
                file,
                revision=revision,
                local_files_only=not repository.is_online,
                endpoint=endpoint(),
            )
        )

    try:
        path = at(address.revision)  # so the cache knows the branch's commit, for use offline
        return path if repository.commit in path.parts else at(repository.commit)
    except Exception as error:  # from the network, the disk, or the Hub
        raise sentence(hub, replace(address, file=file), error) from error


def _is_answer(hub: Any, error: Exception) -> bool:
    """Return whether the Hub answered that it has no such thing, or gives it to others only."""
    errors = hub.errors
    refusals = (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.DisabledRepoError,
        errors.HFValidationError,
    )
    return isinstance(error, refusals)


def sentence(hub: Any, address: Address, error: Exception) -> KloraError:
    """Return one sentence for an error of huggingface_hub; it repeats no text of the error."""
    errors, repo = hub.errors, address.repo
    if isinstance(error, errors.GatedRepoError):
        return KloraError(
            f"{repo} is gated. Accept its terms on {shown_endpoint()}/{repo}, and log in with "
            "'hf auth login' or set HF_TOKEN."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return KloraError(
            f"there is no path {repo}, and the Hub has no model of that name that you may see. "
            "Check the name; for a private model, log in with 'hf auth login' or set HF_TOKEN."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return KloraError(
            f"{repo} has no revision {shown(address.revision)}. Name a branch, a tag or a commit."
        )
    if isinstance(error, errors.DisabledRepoError):
        return KloraError(f"the Hub has disabled {repo}. Name another model.")
    if isinstance(error, errors.HFValidationError):
        return ConfigError(f"{shown(repo)} is no name of a model on the Hub. Check it.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return KloraError(
            f"{address} is not in the cache, and HF_HUB_OFFLINE forbids a download. Download it "
            "first, or unset HF_HUB_OFFLINE."
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return KloraError(
            f"the Hub answered {status} for {address}. Check the token if it is 401 or 403, or try "
            "again later."
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return KloraError(
            f"{address} is not in the cache, and {shown_endpoint()} cannot be reached. Check the "
            "connection, or name a path."
        )
    if isinstance(error, OSError) and error.errno is not None:
        return KloraError(f"{address} cannot be saved: {error.strerror}. Make room or set HF_HOME.")
    return KloraError(
        f"{shown_endpoint()} cannot be reached for {address} ({type(error).__name__}). Check the "
        "connection, or name a path."
    )
