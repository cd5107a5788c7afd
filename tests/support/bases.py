"""Bases whose weights are packed, cast, or elsewhere: each made from a plain tiny pipeline.

A new kind of base is a builder and a row. GGUF packs rows in blocks of 32 numbers: what is loaded
from a file keeps its narrower layers as they are.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import nn

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Base:
    """One kind of base."""

    name: str
    prepare: Callable[[Any], Any]
    """Makes the denoiser of a plain pipeline one of this kind."""
    hindrance: str | None
    """What merging into its attention layers is refused with; None where it works."""
    late: bool = False
    """Whether it can come while a fusion is applied in mode branch."""
    tolerance: float = 1e-5
    """Relative difference of latents; more where activations or merged weights are rounded too."""
    dtype: torch.dtype = torch.float32
    """In which the pipeline computes."""
    on_flux: bool = False
    """Whether it is tried on a transformer too, not on a UNet alone."""
    is_variant: bool = False
    """Whether it is another row with one setting changed, or two rows together; its tests are
    slow."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Refused:
    """What no mode can be applied to."""

    name: str
    prepare: Callable[[Any], Any]
    """Makes a plain pipeline, with a LoRA loaded where ``lora`` is set, into one of this kind."""
    undo: Callable[[Any], Any]
    """What the message says to do first."""
    message: str
    """A pattern for the error's text."""
    lora: bool = True

    def __str__(self) -> str:
        return self.name


def denoiser_name(pipe: Any) -> str:
    return "unet" if hasattr(pipe, "unet") else "transformer"


def denoiser(pipe: Any) -> Any:
    return getattr(pipe, denoiser_name(pipe))


def _folder(pipe: Any) -> Path:
    """A folder that lasts as long as a pipeline."""
    folder = TemporaryDirectory()
    weakref.finalize(pipe, folder.cleanup)
    return Path(folder.name)


def _all(*prepare: Callable[[Any], Any]) -> Callable[[Any], None]:
    """One kind of base on top of another."""

    def prepare_all(pipe: Any) -> None:
        for each in prepare:
            each(pipe)

    return prepare_all


def _attention(pipe: Any, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace the linear layers of all attention blocks."""
    model = denoiser(pipe)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and ".attn" in path:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, make(module))


def _reloaded(library: str, config: Callable[[], Any]) -> Callable[[Any], None]:
    """Save the denoiser, and load it quantised as diffusers does."""

    def prepare(pipe: Any) -> None:
        pytest.importorskip(library, reason=f"{library} is not installed")
        folder, model = _folder(pipe), denoiser(pipe)
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(
            folder, quantization_config=config(), torch_dtype=model.dtype
        )
        setattr(pipe, denoiser_name(pipe), loaded.requires_grad_(False))

    return prepare


def torchao_int8(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def _torchao(pipe: Any) -> None:
    torchao_int8(denoiser(pipe))


def _torchao_config() -> Any:
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _torchao_float8() -> Any:
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8WeightOnlyConfig

    return TorchAoConfig(Float8WeightOnlyConfig())


def _torchao_int4() -> Any:
    """The one of torchao's kinds of int4 that a CPU has."""
    from diffusers import TorchAoConfig
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(16)))


def _quanto_config(dtype: str) -> Callable[[], Any]:
    def config() -> Any:
        from diffusers import QuantoConfig

        return QuantoConfig(weights_dtype=dtype)

    return config


def _quanto_int4(pipe: Any) -> None:
    """Its unpacking is compiled when it is first needed."""
    if absent := [tool for tool in ("c++", "ninja") if shutil.which(tool) is None]:
        pytest.skip(f"optimum-quanto's int4 needs {' and '.join(absent)}, which are not installed")
    _reloaded("optimum.quanto", _quanto_config("int4"))(pipe)


def _sdnq_config(**options: Any) -> Callable[[], Any]:
    def config() -> Any:
        from diffusers import SDNQConfig

        return SDNQConfig(quant_conv=True, minimum_allowed_numel=1, **options)

    return config


def _hqq(pipe: Any) -> None:
    """By hand: diffusers does not load it."""
    hqq = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=32)
    computes = {"compute_dtype": torch.float32, "device": "cpu"}
    _attention(pipe, lambda module: hqq.HQQLinear(module, config, **computes))


def _black_forest_labs(pipe: Any, scheme: str) -> None:
    """Layers of the published FLUX.2 in 8 and 4 bits; by hand: diffusers loads whole files only."""
    from diffusers.quantizers.bfl import utils

    def make(module: nn.Linear) -> nn.Module:
        packed = utils.QUANTIZED_LINEARS[scheme](
            module.in_features,
            module.out_features,
            module.bias is not None,
            compute_dtype=torch.float32,
        )
        weights = getattr(utils, f"quantize_{scheme}")(module.weight.detach())
        names = ("weight", "weight_scale", "weight_scale_2", "input_scale")
        state = dict(zip(names, (*weights, torch.ones(())), strict=False))
        state = {name: value for name, value in state.items() if name in packed.state_dict()}
        packed.load_state_dict(state | ({} if module.bias is None else {"bias": module.bias}))
        return packed.requires_grad_(False)

    _attention(pipe, make)


def _bitsandbytes(kind: str, **options: Any) -> Callable[[Any], None]:
    """By hand: diffusers' own way asks for a GPU.

    The layers stay in training mode: in eval mode ``Linear4bit`` packs its weight another way where
    the processor has AVX512-BF16, which needs widths that are multiples of 64.
    """

    def prepare(pipe: Any) -> None:
        layers = pytest.importorskip("bitsandbytes.nn", reason="bitsandbytes is not installed")

        def make(module: nn.Linear) -> nn.Module:
            shape = module.in_features, module.out_features, module.bias is not None
            packed: nn.Module = getattr(layers, kind)(*shape, **options)
            packed.load_state_dict(module.state_dict())
            return packed.requires_grad_(False).to("cpu")  # packs

        _attention(pipe, make)

    return prepare


def _gguf_layers(pipe: Any) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0

    def make(module: nn.Linear) -> nn.Module:
        shape = module.in_features, module.out_features, module.bias is not None
        packed: nn.Module = GGUFLinear(*shape, compute_dtype=torch.float32)
        weight = gguf.quantize(module.weight.detach().numpy(), kind)
        packed.weight = GGUFParameter(torch.from_numpy(weight), quant_type=kind)
        if module.bias is not None:
            packed.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
        return packed

    _attention(pipe, make)


def _gguf_file(kind: str) -> Callable[[Any], None]:
    """Write the denoiser to a GGUF file and load that."""

    def prepare(pipe: Any) -> None:
        gguf = pytest.importorskip("gguf", reason="gguf is not installed")
        from diffusers import GGUFQuantizationConfig

        folder, model = _folder(pipe), denoiser(pipe)
        model.save_config(folder)
        quantization = gguf.GGMLQuantizationType[kind]
        block, _ = gguf.GGML_QUANT_SIZES[quantization]
        writer = gguf.GGUFWriter(folder / "model.gguf", denoiser_name(pipe))
        for name, tensor in model.state_dict().items():
            array = tensor.float().numpy()
            if array.ndim == 2 and array.shape[1] % block == 0:
                packed = gguf.quantize(array, quantization)
                writer.add_tensor(name, packed, raw_dtype=quantization)
            else:
                writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        loaded = type(model).from_single_file(
            str(folder / "model.gguf"),
            config=str(folder),
            quantization_config=GGUFQuantizationConfig(compute_dtype=model.dtype),
            torch_dtype=model.dtype,
        )
        setattr(pipe, denoiser_name(pipe), loaded.requires_grad_(False))

    return prepare


def _layerwise_casting(storage: torch.dtype) -> Callable[[Any], None]:
    def prepare(pipe: Any) -> None:
        model = denoiser(pipe)
        model.enable_layerwise_casting(storage, compute_dtype=model.dtype)

    return prepare


def _model_offload(pipe: Any) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerate.cpu_offload_with_hook(denoiser(pipe), execution_device=CPU)


def _model_offload_of_the_pipeline(pipe: Any) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    pipe.enable_model_cpu_offload(device="cpu")  # its hooks say cpu:0, tensors cpu


def _sequential_offload(pipe: Any) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerate.cpu_offload(denoiser(pipe), execution_device=CPU)


def _group_offload(kind: str, device: torch.device = CPU) -> Callable[[Any], None]:
    def prepare(pipe: Any) -> None:
        denoiser(pipe).enable_group_offload(
            onload_device=device, offload_type=kind, num_blocks_per_group=1
        )

    return prepare


def _group_offload_to_disk(pipe: Any) -> None:
    denoiser(pipe).enable_group_offload(
        onload_device=CPU, offload_type="leaf_level", offload_to_disk_path=str(_folder(pipe))
    )


_LEAVES = _group_offload("leaf_level")
_FLOAT8 = _layerwise_casting(torch.float8_e4m3fn)
_4BIT = {"compute_dtype": torch.float32, "quant_type": "nf4"}
_INT8 = _bitsandbytes("Linear8bitLt", has_fp16_weights=False)

_GROUP = "group offloading keeps its own copy of the weight; switch it off first"
_META = "its weight has no memory (meta device): sequential offloading is on"
_CAST = "its weight is torch.float8_e4m3fn, by layerwise casting"
_INT8TENSOR = "its weight is a Int8Tensor, not a plain tensor"
_GGUFPARAMETER = "its weight is a GGUFParameter, not a plain tensor"
_LINEAR4BIT = "its weight is torch.uint8, of a Linear4bit"
_LINEAR8BIT = "its weight is torch.int8, of a Linear8bitLt"

BASES = (
    Base("torchao-int8", _torchao, _INT8TENSOR, late=True),
    Base(
        "torchao-int8-loaded",
        _reloaded("torchao", _torchao_config),
        _INT8TENSOR,
        tolerance=2e-2,
        dtype=torch.bfloat16,
        on_flux=True,
    ),
    Base("bitsandbytes-int8", _INT8, _LINEAR8BIT, tolerance=2e-3),
    Base("bitsandbytes-nf4", _bitsandbytes("Linear4bit", **_4BIT), _LINEAR4BIT, on_flux=True),
    Base(
        "bitsandbytes-fp4-stored-as-bfloat16",
        _bitsandbytes(
            "Linear4bit", **{**_4BIT, "quant_type": "fp4", "quant_storage": torch.bfloat16}
        ),
        "its weight is a Params4bit, not a plain parameter",
        is_variant=True,
    ),
    Base("gguf-q8_0", _gguf_layers, _GGUFPARAMETER, is_variant=True),
    Base("gguf-q4_0-loaded", _gguf_file("Q4_0"), _GGUFPARAMETER, on_flux=True),
    Base(
        "gguf-q8_0-loaded-bfloat16",
        _gguf_file("Q8_0"),
        _GGUFPARAMETER,
        tolerance=2e-2,
        dtype=torch.bfloat16,
        is_variant=True,
    ),
    Base(
        "quanto-int8-loaded",
        _reloaded("optimum.quanto", _quanto_config("int8")),
        "its weight is a WeightQBytesTensor, not a plain tensor",
        is_variant=True,
    ),
    Base(
        "quanto-float8-loaded",
        _reloaded("optimum.quanto", _quanto_config("float8")),
        "its weight is a WeightQBytesTensor, not a plain tensor",
    ),
    Base(
        "quanto-int4-loaded",
        _quanto_int4,
        "its weight is a WeightQBitsTensor, not a plain tensor",
        is_variant=True,
    ),
    Base(
        "torchao-float8-loaded",
        _reloaded("torchao", _torchao_float8),
        "its weight is a Float8Tensor, not a plain tensor",
        on_flux=True,
    ),
    Base(
        "torchao-int4-loaded",
        _reloaded("torchao", _torchao_int4),
        "its weight is a IntxUnpackedToInt8Tensor, not a plain tensor",
        is_variant=True,
    ),
    Base(
        "sdnq-int8-loaded",
        _reloaded("sdnq", _sdnq_config(weights_dtype="int8")),
        "its weight is torch.int8, of a SDNQLinear",
        on_flux=True,
        is_variant=True,  # SDNQ compiles its kernels for each shape, a minute of them here
    ),
    Base(
        "sdnq-uint4-loaded",
        _reloaded("sdnq", _sdnq_config(weights_dtype="uint4")),
        "its weight is torch.uint8, of a SDNQLinear",
        is_variant=True,
    ),
    Base(
        "sdnq-int8-products-loaded",
        _reloaded("sdnq", _sdnq_config(weights_dtype="int8", use_quantized_matmul=True)),
        "its weight is torch.int8, of a SDNQLinear",
        tolerance=2e-3,
        is_variant=True,
    ),
    Base(
        "black-forest-labs-fp8r",
        lambda pipe: _black_forest_labs(pipe, "fp8r"),
        "its weight is torch.float8_e4m3fn, of a BFLFP8RLinear",
        is_variant=True,
    ),
    Base(
        "black-forest-labs-nvfp4",
        lambda pipe: _black_forest_labs(pipe, "nvfp4"),
        "its weight is torch.uint8, of a BFLNVFP4Linear",
        on_flux=True,
    ),
    Base("hqq-4bit", _hqq, "its weight is torch.uint8, of a HQQLinear", on_flux=True),
    Base("layerwise-casting", _FLOAT8, _CAST, late=True, on_flux=True),
    Base(
        "layerwise-casting-bfloat16",
        _FLOAT8,
        _CAST,
        tolerance=2e-2,
        dtype=torch.bfloat16,
        is_variant=True,
    ),
    Base(
        "layerwise-casting-from-bfloat16", _layerwise_casting(torch.bfloat16), None, tolerance=5e-3
    ),
    Base("model-offload", _model_offload, None, late=True, is_variant=True),
    Base("model-offload-of-the-pipeline", _model_offload_of_the_pipeline, None, late=True),
    Base("sequential-offload", _sequential_offload, _META, late=True, on_flux=True),
    Base("group-offload-leaves", _LEAVES, _GROUP, late=True, on_flux=True),
    Base(
        "group-offload-blocks",
        _group_offload("block_level"),
        _GROUP,
        late=True,
        on_flux=True,
        is_variant=True,
    ),
    Base(
        "group-offload-of-an-indexed-device",
        _group_offload("leaf_level", torch.device("cpu", 0)),
        _GROUP,
        is_variant=True,
    ),
    Base("group-offload-disk", _group_offload_to_disk, _GROUP),
    Base("layerwise-casting+group-offload", _all(_FLOAT8, _LEAVES), _CAST, is_variant=True),
    Base(
        "layerwise-casting+sequential-offload",
        _all(_FLOAT8, _sequential_offload),
        _CAST,
        is_variant=True,
    ),
    Base("torchao-int8+group-offload", _all(_torchao, _LEAVES), _INT8TENSOR, is_variant=True),
    Base(
        "torchao-int8+sequential-offload",
        _all(_torchao, _sequential_offload),
        _INT8TENSOR,
        is_variant=True,
    ),
    Base(
        "bitsandbytes-int8+sequential-offload",
        _all(_INT8, _sequential_offload),
        _LINEAR8BIT,
        tolerance=2e-3,
        is_variant=True,
    ),
    Base(
        "gguf-q8_0+model-offload",
        _all(_gguf_layers, _model_offload),
        _GGUFPARAMETER,
        is_variant=True,
    ),
)


def _unload(pipe: Any) -> None:
    pipe.unload_lora_weights()


_ADAPTERS = r"unet carries PEFT adapters on \d+ modules, active or not, .*unload_lora_weights\(\)"

REFUSED = (
    Refused("adapters-disabled", lambda pipe: pipe.disable_lora(), _unload, _ADAPTERS),
    Refused("adapters-off-in-the-model", lambda p: p.unet.disable_adapters(), _unload, _ADAPTERS),
    Refused("adapters-of-weight-0", lambda p: p.set_adapters("lora", 0.0), _unload, _ADAPTERS),
    Refused("adapters-deleted", lambda pipe: pipe.delete_adapters("lora"), _unload, _ADAPTERS),
    Refused(
        "fused-projections",
        lambda pipe: pipe.fuse_qkv_projections(),
        lambda pipe: pipe.unfuse_qkv_projections(),
        r"unused since fuse_qkv_projections\(\); call pipe\.unfuse_qkv_projections\(\)",
        lora=False,
    ),
)
