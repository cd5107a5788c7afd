"""UNets of Stable Diffusion in the names of their authors (CompVis' LDM, Stability's SGM).

The authors number the modules of each half consecutively: ``input_blocks.N`` counts residual blocks
and downsamplers, ``output_blocks.N`` counts residual blocks. diffusers numbers blocks, and layers
inside each block. Both follow from the structure, so the rows are derived from it, as in
``convert_ldm_unet_checkpoint`` of diffusers' ``loaders/single_file_utils.py``.

kohya's sd-scripts trains SD 1.x and 2.x in diffusers' names and SDXL in the authors'; ComfyUI and
LyCORIS files have the authors' names for all. A name that SD 1.x and SDXL share maps to the same
diffusers module in both. Only SDXL has ``label_emb``, more than one transformer block in an
attention and attentions in ``output_blocks.0`` to ``2``; only SD 1.x and 2.x have attentions in
``input_blocks.1`` and ``2`` and in ``output_blocks.6`` to ``11``. SD 1.x and 2.x differ in widths
only. The refiner is SD 1.x without its finest attentions and with four transformer blocks in each
remaining attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count

from klora_runtime.families.rows import Layout, Row, renamed

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}
_SHORTCUT = {"skip_connection": "conv_shortcut"}
_ATTENTION = ("norm", "proj_in", "proj_out")
_TRANSFORMER = (
    *(f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
    "norm1",
    "norm2",
    "norm3",
)
_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_SIZE_AND_CROP = {
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}


#: Last name of a 3x3 convolution in diffusers' names -> the kernel's size.
KERNELS: Mapping[str, tuple[int, ...]] = dict.fromkeys(
    ("conv", "conv1", "conv2", "conv_in", "conv_out"), (3, 3)
)

#: Last names of the 1x1 convolutions that every UNet has.
POINTWISE = ("conv_shortcut",)


@dataclass(frozen=True)
class UNetStructure:
    """The structure of a UNet, from which its module names follow."""

    widths: tuple[int, ...]
    """Channels of each block as multiples of the first block's, from the finest block."""
    transformers: tuple[int, ...]
    """Transformer blocks per attention in each block; 0 means no attention."""
    middle: int
    """Transformer blocks in the attention of the middle block."""
    size_and_crop: bool
    """Whether the picture's size is an input (``label_emb``)."""
    layers: int = 2
    """Residual blocks per block on the way down; there is one more on the way up."""

    @property
    def blocks(self) -> Mapping[str, int]:
        """List of blocks -> its length, in the order that data flows."""
        return {
            "down_blocks": len(self.transformers),
            "mid_block": 1,
            "up_blocks": len(self.transformers),
        }

    def layout(self, family: str) -> Layout:
        """Return the layout of all modules, norms included.

        Args:
            family: key of the base model's record.
        """
        return Layout("ldm", family, "unet", tuple(self._rows()))

    def _rows(self) -> Iterator[Row]:
        yield from (Row(source, (target,)) for source, target in _TOP.items())
        if self.size_and_crop:
            yield from (Row(source, (target,)) for source, target in _SIZE_AND_CROP.items())
        yield from self._down()
        yield from renamed("middle_block.0", "mid_block.resnets.0", _RESNET)
        yield from _attention("middle_block.1", "mid_block.attentions.0", self.middle)
        yield from renamed("middle_block.2", "mid_block.resnets.1", _RESNET)
        yield from self._up()

    def _down(self) -> Iterator[Row]:
        number = count(1)
        for block, depth in enumerate(self.transformers):
            target = f"down_blocks.{block}"
            wider = self.widths[block] != self.widths[max(block - 1, 0)]
            for layer in range(self.layers):
                source = f"input_blocks.{next(number)}"
                names = _RESNET | _SHORTCUT if wider and layer == 0 else _RESNET
                yield from renamed(f"{source}.0", f"{target}.resnets.{layer}", names)
                yield from _attention(f"{source}.1", f"{target}.attentions.{layer}", depth)
            if block < len(self.transformers) - 1:
                source = f"input_blocks.{next(number)}.0.op"
                yield Row(source, (f"{target}.downsamplers.0.conv",))

    def _up(self) -> Iterator[Row]:
        number = count()
        for block, depth in enumerate(reversed(self.transformers)):
            target = f"up_blocks.{block}"
            for layer in range(self.layers + 1):
                source = f"output_blocks.{next(number)}"
                names = _RESNET | _SHORTCUT  # its input is concatenated with that of the way down
                yield from renamed(f"{source}.0", f"{target}.resnets.{layer}", names)
                yield from _attention(f"{source}.1", f"{target}.attentions.{layer}", depth)
            if block < len(self.transformers) - 1:
                place = 2 if depth else 1
                yield Row(f"{source}.{place}.conv", (f"{target}.upsamplers.0.conv",))


def _attention(source: str, target: str, depth: int) -> Iterator[Row]:
    if not depth:
        return
    yield from renamed(source, target, {name: name for name in _ATTENTION})
    for i in range(depth):
        inner = {
            f"transformer_blocks.{i}.{name}": f"transformer_blocks.{i}.{name}"
            for name in _TRANSFORMER
        }
        yield from renamed(source, target, inner)
