"""The base model: a small text-to-image pipeline from parts of diffusers and transformers.

Drawings of 48 x 48 pixels become 27 channels of 16 x 16 by ``pixel_unshuffle``, so there is no
autoencoder. The UNet is trained by rectified flow.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch.nn.functional import pixel_shuffle
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

#: Ratio of the drawings' height and width to those of the UNet's input.
PATCH = 3
LATENT = 16
TOKENS = 8
_WIDTH = 128


class DrawingPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Text to drawing, with classifier-free guidance against the empty prompt."""

    model_cpu_offload_seq = "text_encoder->unet"

    def __init__(self, unet: Any, scheduler: Any, text_encoder: Any, tokenizer: Any) -> None:
        super().__init__()
        self.register_modules(
            unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )

    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return the embeddings of prompts, (prompts, tokens, width)."""
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=TOKENS, return_tensors="pt"
        ).input_ids
        hidden: torch.Tensor = self.text_encoder(ids.to(self.text_encoder.device))[0]
        return hidden

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = 24,
        guidance_scale: float = 2.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Draw pictures.

        Args:
            prompt: one or several prompts.
            num_inference_steps: number of denoiser evaluations.
            guidance_scale: guidance scale; 1 means no guidance.
            generator: generator of the noise; one for all prompts, or one for each.
            output_type: ``pil``, or ``pt`` for (prompts, 3, 48, 48) in [0, 1].
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        device, dtype = self._execution_device, self.unet.dtype
        guided = guidance_scale != 1
        states = self.encode([*prompts, *("" for _ in prompts if guided)]).to(device, dtype)
        shape = (len(prompts), self.unet.config.in_channels, LATENT, LATENT)
        x = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for t in self.progress_bar(self.scheduler.timesteps):
            batch = torch.cat([x, x]) if guided else x
            flow = self.unet(batch, t, encoder_hidden_states=states).sample
            if guided:
                wanted, empty = flow.chunk(2)
                flow = empty + guidance_scale * (wanted - empty)
            x = self.scheduler.step(flow, t, x).prev_sample
        pictures = (pixel_shuffle(x, PATCH).float() / 2 + 0.5).clamp(0, 1).cpu()
        if output_type == "pt":
            return ImagePipelineOutput(images=pictures)
        arrays = (pictures.permute(0, 2, 3, 1) * 255).round().byte().numpy()
        return ImagePipelineOutput(images=[Image.fromarray(array) for array in arrays])


def load(weights: Path) -> DrawingPipeline:
    """Return the base model of a folder of weights, float32."""
    pipe = DrawingPipeline.from_pretrained(weights / "base", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def new_pipeline(words: Sequence[str]) -> DrawingPipeline:
    """Return an untrained pipeline.

    Args:
        words: all words that prompts may contain.
    """
    tokenizer = _tokenizer(words)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_WIDTH,
            intermediate_size=2 * _WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=LATENT,
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        layers_per_block=1,
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=16,
        cross_attention_dim=_WIDTH,
        use_linear_projection=True,
    )
    return DrawingPipeline(unet, FlowMatchEulerDiscreteScheduler(), text_encoder, tokenizer)


def _tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Punctuation, WhitespaceSplit
    from tokenizers.pre_tokenizers import Sequence as Steps
    from tokenizers.processors import TemplateProcessing

    special = ["<bos>", "<eos>", "<pad>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Steps([WhitespaceSplit(), Punctuation("removed")])
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
