"""The file of a repository that is meant, if its name does not say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from klora_runtime.errors import ConfigError, shown
from klora_runtime.hub.address import SUFFIXES
from klora_runtime.signature import SUFFIX as SIGNATURE_SUFFIX

ARTIFACT_SUFFIX = ".klora.safetensors"

_LISTED = 12
_SIGNATURE = f"*{SIGNATURE_SUFFIX}"


@dataclass(frozen=True)
class Kind:
    """What a repository is searched for."""

    noun: str
    """Its name in errors."""
    usual: tuple[str, ...]
    """Ends of the names that such files usually have; the first one that a file has decides."""
    beside: tuple[str, ...] = ()
    """Names of files that are read together with it, from the same folder; ``*`` is its own."""

    def may_be(self, file: str) -> bool:
        """Return whether a file with a usual name may be meant: an artifact is no LoRA."""
        return ARTIFACT_SUFFIX in self.usual or not file.endswith(ARTIFACT_SUFFIX)


#: A file of LoRA, as diffusers, PEFT and other trainers upload it.
LORA = Kind(
    "LoRA",
    ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", ".safetensors", *SUFFIXES),
    ("adapter_config.json",),
)
#: An artifact of klora.
ARTIFACT = Kind("artifact", (ARTIFACT_SUFFIX, ".safetensors"), (_SIGNATURE,))
#: The file of a base model, which its name always says.
MODEL = Kind("base model", (".safetensors",))
#: An artifact or a LoRA.
EITHER = Kind("artifact or LoRA", (ARTIFACT_SUFFIX, *LORA.usual), (*LORA.beside, _SIGNATURE))


def choose(repo: str, files: Sequence[str], kind: Kind) -> str:
    """Return the file of a repository that is meant.

    Args:
        repo: the repository, for the error.
        files: all paths in it.
        kind: what is meant.

    Raises:
        ConfigError: no file is of this kind, or several are.
    """
    for end in kind.usual:
        found = [file for file in files if file.endswith(end) and kind.may_be(file)]
        outermost = [file for file in found if "/" not in file]
        if len(found) == 1 or len(outermost) == 1:
            return (outermost or found)[0]
        if found:
            raise ConfigError(
                f"{repo} has {len(found)} files that may be the {kind.noun}: {listed(found)}. "
                "Name one with --weight-name (weight_name= in Python)."
            )
    raise ConfigError(f"{repo} has no {kind.noun}; found {listed(files)}. Name another repository.")


def listed(files: Sequence[str]) -> str:
    """Return the files of a repository in words, the first ones if they are many."""
    if not files:
        return "no file"
    text = ", ".join(shown(file) for file in files[:_LISTED])
    more = len(files) - _LISTED
    return f"{text} and {more} more" if more > 0 else text
