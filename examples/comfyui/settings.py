"""What users set in nodes, as klora's values: files, and weights of slots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from klora_runtime.artifact.file import load_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import ArtifactError, ConfigError, shown
from klora_runtime.layers.live_fusion import checked_weights

#: The name of the artifacts' folder among ComfyUI's model folders.
FOLDER = "klora"

_ENDING = ".safetensors"


def register_folder() -> None:
    """Add the folder of artifacts to ComfyUI's model folders, beside those that users named."""
    import folder_paths

    place = Path(folder_paths.models_dir, FOLDER)
    place.mkdir(parents=True, exist_ok=True)
    named, _ = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    folders = list(dict.fromkeys([*named, str(place)]))
    folder_paths.folder_names_and_paths[FOLDER] = (folders, {_ENDING})


def artifact_names() -> list[str]:
    """Return the files in the folder of artifacts, as a node lists them."""
    import folder_paths

    return list(folder_paths.get_filename_list(FOLDER))


def artifact_path(name: str) -> Path:
    """Return the path of a file of the folder.

    Raises:
        ArtifactError: there is no such file.
    """
    import folder_paths

    found = folder_paths.get_full_path(FOLDER, name)
    if found is None:
        raise ArtifactError(
            f"there is no artifact {shown(name)} in ComfyUI's folder models/{FOLDER}. Put a "
            ".klora.safetensors file there, and reload the page."
        )
    return Path(found)


def loaded(name: str) -> Fusion:
    """Read an artifact of the folder.

    Raises:
        ArtifactError: there is no such file, or it breaks the format; ``issues`` lists why.
    """
    return load_fusion(artifact_path(name))


def weights_of(fusion: Fusion, content: float, style: float, others: str) -> dict[str, float]:
    """Return slot -> weight from a node's inputs.

    Args:
        content, style: weights of these slots; 1 is allowed where a fusion has no such slot.
        others: ``SLOT=NUMBER`` pairs, separated by commas or spaces.

    Raises:
        ConfigError: a slot is unknown, stated twice, or its weight is no number in range.
    """
    weights: dict[str, Any] = {}
    for slot, weight in (("content", content), ("style", style)):
        if slot in fusion.slots or weight != 1.0:
            weights[slot] = weight
    for pair in others.replace(",", " ").split():
        slot, sign, number = pair.rpartition("=")
        if not sign or not slot:
            raise ConfigError(f"weights: expected SLOT=NUMBER, found {shown(pair)}.")
        if slot in ("content", "style"):
            raise ConfigError(f"weights: set {slot} in its own field, not here.")
        if slot in weights:
            raise ConfigError(f"weights: {shown(slot)} is stated twice; remove one.")
        weights[slot] = _number(slot, number)
    return checked_weights(fusion, weights)


def _number(slot: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"weights: {shown(slot)} needs a number, found {shown(text)}.") from None


def fingerprint(name: str) -> Mapping[str, Any]:
    """Return what changes when a file of the folder is replaced."""
    stat = artifact_path(name).stat()
    return {"name": name, "bytes": stat.st_size, "changed": stat.st_mtime_ns}
