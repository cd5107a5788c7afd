"""Components of one pipeline that no rule on their names and classes makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusers import (
    AmusedScheduler,
    AutoencoderKL,
    AutoencoderKLWan,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    HeliosScheduler,
    IPNDMScheduler,
    SCMScheduler,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQDiffusionScheduler,
)
from diffusers.pipelines.deprecated.vq_diffusion import (
    LearnedClassifierFreeSamplingEmbeddings,
)
from diffusers.pipelines.stable_diffusion.clip_image_project_model import CLIPImageProjection
from support.sweep.inputs import PIXELS
from support.sweep.shrinking import tiny
from support.sweep.words import tiny_encoder, tiny_processor, tiny_tokenizer
from tiny_pipeline import TEXT_WIDTH
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    Qwen3Model,
    Qwen3VLModel,
    T5EncoderModel,
)


class Harmless:
    """Stands for a checker that finds nothing."""

    def check_text_safety(self, text: str) -> bool:
        return isinstance(text, str)

    def to(self, *_: Any) -> Harmless:
        return self

    def check_video_safety(self, video: Any) -> Any:
        return video


class WordsOnly:
    """Stands for a processor of words and pictures, and reads the words alone."""

    def __init__(self) -> None:
        self.tokenizer = tiny_tokenizer()
        self.image_processor = None

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        return [self.tokenizer.apply_chat_template(*args, **kwargs)]

    def __call__(self, *, text: Any, images: Any = None, **kwargs: Any) -> Any:
        del images
        return self.tokenizer(text, **kwargs)


def chroma_without_guidance() -> Any:
    """The denoiser of Chroma whose configuration says that it has no guidance."""
    model = tiny(ChromaTransformer2DModel)
    model.register_to_config(guidance_embeds=False)
    return model


#: Pipeline -> components that no rule makes.
OWN_PARTS: Mapping[str, Callable[[], Mapping[str, Any]]] = {
    **dict.fromkeys(
        (
            *("Cosmos2_5_PredictBasePipeline", "Cosmos2_5_TransferPipeline"),
            *("CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline", "Cosmos3OmniPipeline"),
        ),
        lambda: {"safety_checker": Harmless()},
    ),
    **dict.fromkeys(
        ("SanaSprintPipeline", "SanaSprintImg2ImgPipeline"),
        lambda: {"scheduler": SCMScheduler()},
    ),
    **dict.fromkeys(
        (*("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline", "LucyEditPipeline"),),
        lambda: {"boundary_ratio": 0.5},
    ),
    **dict.fromkeys(
        ("Cosmos2TextToImagePipeline", "Cosmos2VideoToWorldPipeline"),
        lambda: {
            "safety_checker": Harmless(),
            "scheduler": FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        },
    ),
    "LDMTextToImagePipeline": lambda: {
        "unet": tiny(UNet2DConditionModel),
        "vqvae": tiny(AutoencoderKL),
        "bert": tiny_encoder(CLIPTextModel),
    },
    "JoyImageEditPlusPipeline": lambda: {"processor": WordsOnly()},
    "QwenImage21Pipeline": lambda: {"processor": WordsOnly()},
    "GlmImagePipeline": lambda: {"processor": None, "vision_language_encoder": None},
    "StableDiffusionGLIGENTextImagePipeline": lambda: {
        "processor": tiny_processor(CLIPImageProcessorPil),
        "image_encoder": tiny_encoder(CLIPVisionModelWithProjection, projection_dim=TEXT_WIDTH),
        "image_project": CLIPImageProjection(TEXT_WIDTH),
    },
    "UnCLIPPipeline": lambda: {
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range"),
        "prior_scheduler": UnCLIPScheduler(prediction_type="sample"),
    },
    "UnCLIPImageVariationPipeline": lambda: {
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range")
    },
    "VQDiffusionPipeline": lambda: {
        "scheduler": VQDiffusionScheduler(num_vec_classes=17),
        "learned_classifier_free_sampling_embeddings": (
            LearnedClassifierFreeSamplingEmbeddings(learnable=False)
        ),
    },
    "UniDiffuserPipeline": lambda: {
        "clip_image_processor": tiny_processor(CLIPImageProcessorPil),
        "clip_tokenizer": tiny_tokenizer(),
        "text_tokenizer": tiny_tokenizer(),
    },
    "AudioLDM2Pipeline": lambda: {"text_encoder_2": tiny_encoder(T5EncoderModel)},
    "ChromaInpaintPipeline": lambda: {"transformer": chroma_without_guidance()},
    "Ideogram4Pipeline": lambda: {
        "text_encoder": tiny_encoder(Qwen3VLModel, text_config={"num_hidden_layers": 36})
    },
    "HeliosPyramidPipeline": lambda: {
        "scheduler": HeliosScheduler(gamma=0.3)  # a third cannot be factorised
    },
    "AceStepPipeline": lambda: {
        "text_encoder": tiny_encoder(Qwen3Model),
        "tokenizer": tiny_tokenizer(),
    },
    **dict.fromkeys(
        ("AmusedPipeline", "AmusedImg2ImgPipeline", "AmusedInpaintPipeline"),
        lambda: {"scheduler": AmusedScheduler(mask_token_id=31)},
    ),
    **dict.fromkeys(
        ("StableCascadePriorPipeline", "StableCascadeDecoderPipeline"),
        lambda: {"text_encoder": tiny_encoder(CLIPTextModelWithProjection)},
    ),
    "HeliosPipeline": lambda: {"scheduler": HeliosScheduler(stages=1, stage_range=[0, 1])},
    "DanceDiffusionPipeline": lambda: {"scheduler": IPNDMScheduler()},
    "StableDiffusionDepth2ImgPipeline": lambda: {"depth_estimator": None},
    "StableDiffusionPix2PixZeroPipeline": lambda: {
        "caption_generator": None,
        "caption_processor": None,
    },
    "VisualClozePipeline": lambda: {"resolution": PIXELS},
    "VisualClozeGenerationPipeline": lambda: {"resolution": PIXELS},
    **dict.fromkeys(
        ("SanaVideoPipeline", "SanaImageToVideoPipeline"),
        lambda: {"vae": tiny(AutoencoderKLWan)},
    ),
}
