"""Writing of shots to one file: a picture, a contact sheet, or an animation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from klora_compile.sampling.making import Making
from klora_compile.sampling.pictures import Shot
from klora_compile.sampling.sheet import Row, contact_sheet
from klora_runtime.artifact.replacing import replacing
from klora_runtime.errors import ConfigError, KloraError, shown

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
ANIMATIONS = (".gif", ".webp")

_FRAME_MILLISECONDS = 120
_MAX_FRAMES_ON_A_SHEET = 16
_QUALITY: dict[str, dict[str, Any]] = {
    ".webp": {"lossless": True},
    ".jpg": {"quality": 95},
    ".jpeg": {"quality": 95},
}


def check_ending(path: Path, *, total: int, videos: bool) -> None:
    """Check, before sampling, that the file's suffix suits its contents.

    Args:
        total: number of pictures or videos.
        videos: whether they are videos.

    Raises:
        ConfigError: the suffix does not suit.
    """
    ending = path.suffix.lower()
    if ending in PICTURES or (ending in ANIMATIONS and videos and total == 1):
        return
    if ending in ANIMATIONS:
        reason = f"holds one video, and this would be {total}" if videos else "is for videos"
        raise ConfigError(f"-o {shown(path)}: a {ending} {reason}; name a .png.")
    raise ConfigError(
        f"-o {shown(path)}: expected a name that ends in {', '.join(PICTURES)}, or for one video "
        f"in {' or '.join(ANIMATIONS)}; found {shown(ending) or 'no ending'}."
    )


def write_shots(
    shots: Sequence[Shot], path: Path, making: Making | None = None, *, overwrite: bool = False
) -> str:
    """Write all shots into one file.

    Args:
        shots: sorted by prompt, then by seed; every prompt has the same number of seeds.
        path: the file.
        making: how they were made, for the text of a PNG; None for no text.
        overwrite: replace an existing file.

    Returns:
        A short description of the file's contents.

    Raises:
        KloraError: the file exists and ``overwrite`` is false, or it cannot be written; an old
            file is unchanged.
    """
    ending = path.suffix.lower()
    first = shots[0]
    with replacing(path, overwrite=overwrite) as temporary:
        try:
            if first.is_video and len(shots) == 1 and ending in ANIMATIONS:
                first.frames[0].save(
                    temporary,
                    save_all=True,
                    append_images=first.frames[1:],
                    duration=_FRAME_MILLISECONDS,
                    loop=0,
                    **_QUALITY.get(ending, {}),
                )
                return f"an animation of {len(first.frames)} frames"
            image, words = _one_image(shots)
            if ending in (".jpg", ".jpeg"):
                image = image.convert("RGB")
            options = _QUALITY.get(ending, {})
            if ending == ".png" and making is not None:
                size = dict(zip(("width", "height"), first.frames[0].size, strict=True))
                told = replace(making, facts={**making.facts, **size})
                options = {"pnginfo": told.chunks()}
            image.save(temporary, **options)
        except (ValueError, KeyError) as error:
            raise KloraError(f"{shown(path)} cannot be written: {shown(error)}.") from error
    return words


def write_picture(image: Image.Image, path: Path, *, overwrite: bool = False) -> None:
    """Write one picture.

    Raises:
        KloraError: see :func:`write_shots`.
    """
    ending = path.suffix.lower()
    if ending in (".jpg", ".jpeg"):
        image = image.convert("RGB")
    with replacing(path, overwrite=overwrite) as temporary:
        try:
            image.save(temporary, **_QUALITY.get(ending, {}))
        except (ValueError, KeyError) as error:
            raise KloraError(f"{shown(path)} cannot be written: {shown(error)}.") from error


def _one_image(shots: Sequence[Shot]) -> tuple[Image.Image, str]:
    if shots[0].is_video:
        return _frames_sheet(shots)
    if len(shots) == 1:
        return shots[0].frames[0], "a picture"
    seeds = list(dict.fromkeys(shot.seed for shot in shots))
    rows = [
        Row(shots[start].prompt, [shot.frames[0] for shot in shots[start : start + len(seeds)]])
        for start in range(0, len(shots), len(seeds))
    ]
    sheet = contact_sheet(rows, [f"seed {seed}" for seed in seeds])
    return sheet, f"a sheet of {_times(len(rows), 'prompt')} by {_times(len(seeds), 'seed')}"


def _frames_sheet(shots: Sequence[Shot]) -> tuple[Image.Image, str]:
    """Return a sheet with one row per video."""
    total = max(len(shot.frames) for shot in shots)
    chosen = _spread(total)
    rows = [
        Row(
            f"{shot.prompt} (seed {shot.seed})",
            [shot.frames[index] for index in chosen if index < len(shot.frames)],
        )
        for shot in shots
    ]
    sheet = contact_sheet(rows, [f"frame {index}" for index in chosen])
    videos = _times(len(shots), "video")
    return sheet, f"a sheet of {videos}, {len(chosen)} of {total} frames each"


def _spread(total: int) -> list[int]:
    """Return the indices of at most 16 frames, from the first to the last."""
    count = min(total, _MAX_FRAMES_ON_A_SHEET)
    return [round(index * (total - 1) / max(1, count - 1)) for index in range(count)]


def _times(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
