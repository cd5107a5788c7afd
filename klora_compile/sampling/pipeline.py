"""Loading of diffusers folders as pipelines; every problem becomes one error of klora."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch

from klora_compile.base_models import INDEX, downloaded, read_index
from klora_compile.extras import ADVICE
from klora_compile.own_code import own_pipeline, refuse_own_code
from klora_runtime.artifact.dtypes import REAL
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.artifact.safetensors_file import SafetensorsFile
from klora_runtime.artifact.schedule import STEPLESS
from klora_runtime.artifact.tensor_file import torch_dtype
from klora_runtime.devices.device_types import type_of
from klora_runtime.devices.names import as_device
from klora_runtime.errors import ConfigError, FileFormatError, KloraError, shown
from klora_runtime.hub.address import address_of

_WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)(\.(?P<variant>\w+))?"
    r"(-\d+-of-\d+)?\.(safetensors|bin)"
)


def load_pipeline(
    model: str,
    components: Iterable[str],
    *,
    device: str,
    dtype: str,
    trust_remote_code: bool = False,
) -> Any:
    """Load the pipeline of a diffusers folder and move it to a device.

    Args:
        model: a folder that ``pipe.save_pretrained`` wrote, or an id on the Hub.
        components: parts that a fusion changes; ``auto`` follows the dtype of the denoisers.
        device: see :func:`klora_runtime.devices.names.as_device`.
        dtype: ``float32``, ``float16``, ``bfloat16``, or ``auto``: float32 on a CPU, the dtype of
            the denoiser's files on a GPU.
        trust_remote_code: whether Python files of the model itself may run.

    Raises:
        KloraError: there is no such folder, it cannot be loaded, or it has Python files and they
            are not trusted.
        ConfigError: the device is unknown.
    """
    where = as_device(device)
    folder = _folder(model, trust_remote_code)
    index = read_index(folder / INDEX, model)
    if not trust_remote_code:
        refuse_own_code(folder, index, model)
    _require_libraries(folder, index, model)
    own = own_pipeline(folder, index)
    wanted = _dtype(folder, components, where, dtype)
    loader: Any = diffusers.DiffusionPipeline
    keyword = "torch_dtype" if int(diffusers.__version__.split(".")[0]) < 1 else "dtype"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about the keyword
            pipe = loader.from_pretrained(
                str(folder),
                variant=_variant(folder),
                custom_pipeline=None if own is None else str(own),
                trust_remote_code=trust_remote_code,
                **{keyword: wanted},
            )
    except ImportError as error:
        raise KloraError(
            f"{shown(model)} needs a library that is not installed: {_reason(error)} {ADVICE} (It "
            "brings what most models need.)"
        ) from error
    except Exception as error:  # diffusers raises many types for a broken folder
        raise KloraError(
            f"diffusers cannot load {shown(model)}: {_reason(error)} Get the folder again, or "
            "save it again with pipe.save_pretrained(FOLDER)."
        ) from error
    try:
        return pipe.to(where)
    except RuntimeError as error:
        raise KloraError(
            f"{shown(model)} cannot be moved to {where}: {_reason(error)} Try --dtype bfloat16, "
            "another --device, or a smaller model."
        ) from error


def use_scheduler(pipe: Any, name: str) -> None:
    """Give a pipeline another scheduler of diffusers, with the settings of its present one.

    Args:
        name: a class name, with or without ``Scheduler`` at its end, in any case.

    Raises:
        ConfigError: there is no such scheduler, or it does not fit; the message lists those that
            do.
        KloraError: the scheduler needs a library that is not installed.
    """
    present = getattr(pipe, "scheduler", None)
    if present is None:
        raise ConfigError(f"--scheduler: {type(pipe).__name__} has no scheduler to replace.")
    fitting = {_short(each): each for each in _fitting(present)}
    short = name.lower().removesuffix("scheduler")
    chosen = next((each for key, each in fitting.items() if key.lower() == short), None)
    if chosen is None:
        raise ConfigError(
            f"--scheduler {shown(name)}: not one that fits this model, which comes with "
            f"{_short(type(present))}. These fit: {', '.join(sorted(fitting))}."
        )
    try:
        pipe.scheduler = chosen.from_config(present.config)
    except ImportError as error:
        raise KloraError(
            f"--scheduler {shown(name)} needs a library that is not installed: {_reason(error)}"
        ) from error


def compile_denoiser(pipe: Any, fusion: Fusion) -> None:
    """Compile the denoiser in place: its repeated blocks if it names them, else the whole."""
    for component in fusion.components:
        if component in STEPLESS:
            continue
        model = getattr(pipe, component)
        if getattr(model, "_repeated_blocks", None):
            model.compile_repeated_blocks()
        else:
            model.compile()


def _folder(model: str, trust_remote_code: bool) -> Path:
    folder = Path(model)
    if folder.is_dir():
        if not (folder / INDEX).is_file():
            found = ", ".join(shown(path.name) for path in sorted(folder.iterdir())[:6])
            raise KloraError(
                f"{shown(model)} is not a diffusers folder: expected {INDEX} in it, found "
                f"{found or 'nothing'}. Name the folder that pipe.save_pretrained(FOLDER) "
                "wrote."
            )
        return folder
    if folder.exists():
        raise KloraError(
            f"{shown(model)} is a file, expected a diffusers folder. Make one of a checkpoint: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    address = address_of(model)
    if address is None:
        raise KloraError(
            f"there is no folder {shown(model)}; expected a diffusers folder, or OWNER/NAME of a "
            "model on the Hub."
        )
    if address.file is not None:
        raise KloraError(
            f"{shown(model)} names a file, expected a diffusers folder; name the repository alone."
        )
    return downloaded(address, trust_remote_code=trust_remote_code)


def _require_libraries(folder: Path, index: Mapping[str, Any], model: str) -> None:
    """Check that the libraries of the pipeline's parts are installed."""
    parts = {n: part for n, part in index.items() if isinstance(part, list) and n[:1] != "_"}
    missing = {
        name: part
        for name, part in parts.items()
        if len(part) == 2
        and isinstance(part[0], str)
        and not _is_there(part[0], folder, folder / name)
    }
    if missing:
        libraries = sorted({shown(library) for library, _ in missing.values()})
        raise KloraError(
            f"parts of {shown(model)} come from {', '.join(libraries)}, which is not installed. "
            f"{ADVICE}, or install it alone: pip install {' '.join(libraries)}",
            [f"{shown(name)} is a {shown('.'.join(map(str, p)))}" for name, p in missing.items()],
        )


def _is_there(library: str, *folders: Path) -> bool:
    if hasattr(diffusers.pipelines, library):
        return True
    if any((folder / f"{library}.py").exists() for folder in folders):
        return True
    try:
        return find_spec(library.partition(".")[0]) is not None
    except ValueError:
        return False


def _dtype(folder: Path, components: Iterable[str], device: torch.device, name: str) -> torch.dtype:
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if type_of(device).is_host:
        return torch.float32
    stored: Counter[str] = Counter()
    denoisers = [name for name in components if name not in STEPLESS]
    for path in sorted(
        file for name in denoisers for file in (folder / name).glob("*.safetensors")
    ):
        try:
            with SafetensorsFile(path, "model") as file:
                stored.update(info.dtype for info in file.tensors.values())
        except FileFormatError:
            continue  # diffusers reports the problem
    most = next((name for name, _ in stored.most_common(1)), None)
    return torch_dtype(most) if most in REAL else torch.float32


def _variant(folder: Path) -> str | None:
    """Return the variant, such as ``fp16``, if a part of the pipeline has no other files."""
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        names = [_WEIGHTS.fullmatch(path.name) for path in part.iterdir()]
        variants = {match["variant"] for match in names if match}
        if variants and None not in variants:
            return min(variants)
    return None


def _fitting(scheduler: Any) -> Iterator[Any]:
    """Yield scheduler classes that fit a scheduler's settings; all classes if that is unknown."""
    try:
        yield from scheduler.compatibles
    except AttributeError:
        for name in dir(diffusers):
            if name.endswith("Scheduler"):
                yield getattr(diffusers, name)


def _short(scheduler: type) -> str:
    return scheduler.__name__.removesuffix("Scheduler")


def _reason(error: BaseException) -> str:
    """Return the message of another library in one line."""
    text = shown(" ".join(str(error).split()) or type(error).__name__, limit=500)
    return text if text.endswith((".", "…")) else f"{text}."
