"""Tiny encoders of transformers, by a rule on the names of their settings, and what reads words.

A tokenizer is made on the fly: every byte of a text is a token, between two that say its ends.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from support.sweep.settings import WIDTH
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import nn
from transformers import (
    CLIPVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

#: Tokens that stand for something else than a byte.
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<mask>", "<extra>")
VOCABULARY = 512

#: Argument of a pipeline that has one of these -> it needs no text encoder.
EMBEDDINGS = ("prompt_embeds", "prompt_embeds_t5", "prompt_embeds_qwen")

#: Pipelines that ask their text encoder even where embeddings are given.
READERS = (
    *("AudioLDMPipeline", "MusicLDMPipeline", "LTXI2VLongMultiPromptPipeline"),
    *("WuerstchenPriorPipeline", "WuerstchenCombinedPipeline", "StableCascadeCombinedPipeline"),
    *("JoyImageEditPlusPipeline", "LongCatImagePipeline", "QwenImageLayeredPipeline"),
    "UniDiffuserPipeline",
    *("VisualClozePipeline", "VisualClozeGenerationPipeline"),
)

#: Model -> its configuration, where its class names one of more than it is.
CONFIGS: Mapping[str, type[PreTrainedConfig]] = {"PaintByExampleImageEncoder": CLIPVisionConfig}

#: Setting of a configuration -> what it is in a tiny one.
SMALL: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "out_hidden_size", "n_embd"), WIDTH),
    **dict.fromkeys(("projection_dim", "encoder_hidden_size", "project_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 32),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head"), 2),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "depth", "n_layer"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_decoder_layers"), 1),
    **dict.fromkeys(("head_dim", "d_kv", "q_lora_rank"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("image_size",), 16),
    **dict.fromkeys(("patch_size",), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 1024),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "type_vocab_size": 2,
    "num_position_embeddings": 16,
    "layer_types": None,
}


def reads_words(kind: type[DiffusionPipeline]) -> bool:
    """Whether a pipeline of a class gets text encoders and a prompt, not embeddings."""
    named = inspect.signature(kind.__call__).parameters
    return kind.__name__ in READERS or not any(name in named for name in EMBEDDINGS)


def tiny_encoder(kind: type[PreTrainedModel], **settings: Any) -> Any:
    """A model of transformers of this class, always with the same weights."""
    config = tiny_config(CONFIGS.get(kind.__name__, kind.config_class), **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)  # or every word says the same
    return model.eval().requires_grad_(False)


def tiny_config(kind: Any, **settings: Any) -> Any:
    """A configuration of this class, with the small number for each setting that it has.

    Settings of a part of it are a mapping under the name of that part.
    """
    given = {name: value for name, value in settings.items() if name not in kind.sub_configs}
    parts = {
        name: tiny_config(type(getattr(kind(), name)), **settings.get(name, {})).to_dict()
        for name in kind.sub_configs
        if getattr(kind(), name, None) is not None
    }
    known = {**vars(kind()), **inspect.signature(kind.__init__).parameters}
    small = {name: value for name, value in SMALL.items() if name in known}
    return kind(**{**small, **parts, **given})


def tiny_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    """One token for each byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *letters))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = [(token, SPECIAL.index(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        additional_special_tokens=["<image>"],
        **{"model_max_length": 77, **settings},
    )
    made.chat_template = (
        "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
        "{% endfor %}"
    )
    return made


def is_encoder(kind: Any) -> bool:
    """Whether it is a class of transformers' models, and not the one of all."""
    return isinstance(kind, type) and issubclass(kind, PreTrainedModel) and kind.config_class


def tiny_processor(kind: Any) -> Any:
    """What makes an image fit a tiny encoder of images."""
    size = SMALL["image_size"]
    sizes = {"height": size, "width": size}
    shortest = "Clip" in kind.__name__ or "CLIP" in kind.__name__
    return kind(size={"shortest_edge": size} if shortest else sizes, crop_size=sizes)


def class_named(name: str) -> Any:
    """A class of diffusers or transformers, None where they have none of that name."""
    return getattr(diffusers, name, None) or getattr(transformers, name, None)
