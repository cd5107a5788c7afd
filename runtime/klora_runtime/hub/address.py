"""Names of files and repositories on the Hugging Face Hub, as diffusers takes them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from klora_runtime.errors import ConfigError, shown

#: Suffixes of files of tensors. ``fox/ink.safetensors`` is a path, and ``fox/ink`` a repository.
SUFFIXES = (".safetensors", ".pt", ".bin", ".ckpt")

_DEFAULT_ENDPOINT = "https://huggingface.co"
#: Other addresses of the default endpoint.
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")

_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[^@\s]+?))?(?:/(?P<file>[^@]+))?", re.ASCII
)
_REPO = re.compile(rf"{_PART}/{_PART}", re.ASCII)
#: Words of an address between the repository and the revision.
_VIEWS = ("resolve", "blob", "tree", "raw")

_FORMS = "OWNER/NAME, OWNER/NAME/FILE, hf://OWNER/NAME@REVISION/FILE, or a file's https address"


@dataclass(frozen=True)
class Address:
    """A file of a repository, or the repository."""

    repo: str
    """``OWNER/NAME``."""
    file: str | None = None
    """Path of the file in the repository; None if the name does not say it."""
    revision: str | None = None
    """Branch, tag or commit; None for the main branch."""

    def __str__(self) -> str:
        """Return the address as a name that klora takes."""
        at = "" if self.revision is None else f"@{self.revision}"
        return f"hf://{self.repo}{at}" + ("" if self.file is None else f"/{self.file}")


def address_of(name: str | os.PathLike[str]) -> Address | None:
    """Return the place on the Hub that a name means; None if the name is a path.

    Args:
        name: ``OWNER/NAME``, ``OWNER/NAME/FILE``, either with ``@REVISION`` after the name,
            ``hf://OWNER/NAME@REVISION/FILE``, or the address of a file or repository in a browser.
            An existing path wins over all of them, and a path object is always a path.

    Raises:
        ConfigError: the name begins with ``hf://`` or ``https://``, and is no address of a model.
    """
    if not isinstance(name, str) or _exists(name):
        return None
    if name.startswith("hf://"):
        return _stated(name, name.removeprefix("hf://"))
    if name.startswith(("https://", "http://")):
        return _of_url(name)
    found = _NAME.fullmatch(name)
    if found is None or _is_file(found["repo"]):
        return None
    if found["file"] is not None and not _is_file(found["file"]):
        return None  # a path of folders
    return _address(name, found)


def endpoint() -> str:
    """Return the address of the Hub, from the environment variable HF_ENDPOINT or the default."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or _DEFAULT_ENDPOINT


def shown_endpoint() -> str:
    """Return the address of the Hub for an error, without a user and a token."""
    before, scheme, rest = endpoint().rpartition("://")
    return f"{before}{scheme}{rest.rpartition('@')[2]}"


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long, or with a null character
        return False


def _is_file(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _stated(name: str, rest: str) -> Address:
    found = _NAME.fullmatch(rest.removeprefix("models/"))
    if found is None or rest.startswith(("datasets/", "spaces/")):
        raise _no_address(name)
    return _address(name, found)


def _of_url(name: str) -> Address:
    try:
        parts = urlsplit(name)
    except ValueError as error:  # such as a bracket that stays open
        raise _no_address(name) from error
    if parts.username is not None or "token=" in parts.query:
        raise ConfigError(
            f"the address on {shown(parts.hostname)} holds a user or a token, which files and logs "
            "would show. Leave it out, and log in with 'hf auth login' or set HF_TOKEN."
        )
    if parts.hostname not in {*_HOSTS, urlsplit(endpoint()).hostname}:
        raise ConfigError(
            f"{shown(name)} is not on the Hub ({shown_endpoint()}); download the file, and name "
            "its path."
        )
    pieces = [unquote(piece) for piece in parts.path.split("/") if piece]
    repo, rest = "/".join(pieces[:2]), pieces[2:]
    if not _REPO.fullmatch(repo) or pieces[0] in ("datasets", "spaces", "api"):
        raise _no_address(name)
    if not rest:
        return Address(repo)
    if rest[0] not in _VIEWS or len(rest) < 2:
        raise _no_address(name)
    return _checked(name, Address(repo, "/".join(rest[2:]) or None, rest[1]))


def _address(name: str, found: re.Match[str]) -> Address:
    return _checked(name, Address(found["repo"], found["file"], found["revision"]))


def _checked(name: str, found: Address) -> Address:
    """Refuse a file outside the repository."""
    if found.file is not None and not {"", ".", ".."}.isdisjoint(found.file.split("/")):
        raise _no_address(name)
    return found


def _no_address(name: str) -> ConfigError:
    return ConfigError(f"{shown(name)} names no model on the Hub; write it as {_FORMS}.")
