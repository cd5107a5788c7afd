"""Tiny text encoders of ComfyUI's own classes, and transformers' models with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from support.comfyui.models import filled
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "projection_dim": 32,
}
_T5 = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2}


@dataclass(frozen=True)
class Encoder:
    """One text encoder inside of ComfyUI's ``CLIP``, and its twin."""

    component: str
    """In diffusers' names."""
    comfy: str
    """In ComfyUI's model."""
    tokens: str
    """Key of its tokens."""
    twin: Callable[[], Any]

    def of(self, clip: Any) -> Any:
        return getattr(clip.cond_stage_model, self.comfy)

    def twin_of(self, clip: Any) -> Any:
        """transformers' model with ComfyUI's weights."""
        twin = self.twin()
        named = {
            _plain(key): value for key, value in self.of(clip).transformer.state_dict().items()
        }
        known = twin.state_dict()
        twin.load_state_dict({key: named[_plain(key)] for key in known})
        return twin.eval().requires_grad_(False)


def _plain(key: str) -> str:
    """The name of a parameter in both: T5's embeddings have two names."""
    return key.removeprefix("text_model.").replace("encoder.embed_tokens.", "shared.")


def _clip_twin(act: str) -> Callable[[], Any]:
    config = CLIPTextConfig(
        **_CLIP, hidden_act=act, vocab_size=49408, eos_token_id=49407, bos_token_id=49406
    )
    return lambda: CLIPTextModel(config)


def _t5_twin() -> Any:
    return T5EncoderModel(T5Config(**_T5, feed_forward_proj="gated-gelu", vocab_size=32128))


_CLIP_L = Encoder("text_encoder", "clip_l", "l", _clip_twin("quick_gelu"))
ENCODERS: Mapping[str, tuple[Encoder, ...]] = {
    "sd1": (_CLIP_L,),
    "sdxl": (_CLIP_L, Encoder("text_encoder_2", "clip_g", "g", _clip_twin("gelu"))),
    "flux.1": (_CLIP_L, Encoder("text_encoder_2", "t5xxl", "t5xxl", _t5_twin)),
}


def tiny_clip(family: str, width: int = 32) -> Any:
    """ComfyUI's ``CLIP`` of a family with its own tokenizers and tiny encoders, in float32.

    Args:
        width: of each CLIP's result.
    """
    import comfy.sd
    import comfy.sd1_clip
    import comfy.sdxl_clip
    import comfy.text_encoders.flux
    from comfy.supported_models_base import ClipTarget

    tokenizer, model = {
        "sd1": (comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
        "sdxl": (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel),
        "flux.1": (comfy.text_encoders.flux.FluxTokenizer, comfy.text_encoders.flux.FluxClipModel),
    }[family]
    of_clip = {**_CLIP, "hidden_size": width, "intermediate_size": 2 * width}
    options = {
        "dtype": torch.float32,
        "clip_l_model_config": of_clip,
        "clip_g_model_config": of_clip,
        "t5xxl_model_config": _T5,
    }
    clip = comfy.sd.CLIP(ClipTarget(tokenizer, model), model_options=options)
    filled(clip.cond_stage_model)
    return clip
