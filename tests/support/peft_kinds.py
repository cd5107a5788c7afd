"""Kinds of adapters that PEFT trains, on the layers of ``peft_models``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import torch
from peft import get_peft_model
from support.peft_models import base_folder, layers, merged_changes, randomise

LINEAR = ["to_q", "to_k", "to_out.0"]
CONV = ["conv1", "proj_in"]
BOTH = [*LINEAR, *CONV]


def kind(name: str, targets: list[str], **settings: Any) -> Any:
    return getattr(peft, f"{name}Config")(target_modules=targets, **settings)


#: What is trained -> its configuration, and the form that a report names.
CASES: dict[str, tuple[str, Any]] = {
    "OFT": ("oft", kind("OFT", BOTH, r=0, oft_block_size=4)),
    "OFT, few terms": (
        "oft",
        kind("OFT", LINEAR, r=0, oft_block_size=4, num_cayley_neumann_terms=2),
    ),
    "OFT, exact": ("oft", kind("OFT", BOTH, r=2, oft_block_size=0, use_cayley_neumann=False)),
    "OFT, one block": ("oft", kind("OFT", BOTH, r=0, oft_block_size=4, block_share=True)),
    "OFT, constrained": ("oft", kind("OFT", LINEAR, r=0, oft_block_size=4, coft=True, eps=0.1)),
    "BOFT": ("boft", kind("BOFT", BOTH, boft_block_size=4)),
    "GLoRA": ("glora", kind("Glora", LINEAR, r=2)),
    "GLoRA, all": (
        "glora",
        kind("Glora", LINEAR, r=2, config_A_B="lora", config_C="lora", config_D_E="vector"),
    ),
    "GLoRA, vectors": (
        "glora",
        kind("Glora", LINEAR, config_A_B="vector", config_C="vector", config_D_E="constant"),
    ),
    "GLoRA, numbers": (
        "glora",
        kind("Glora", LINEAR, config_A_B="constant", config_C="none", config_D_E="none"),
    ),
    "IA3": ("ia3", kind("IA3", BOTH, feedforward_modules=["to_k"])),
    "VeRA": ("vera", kind("Vera", LINEAR, r=3)),
    "VeRA, by its seed": (
        "vera",
        kind("Vera", LINEAR, r=3, save_projection=False, projection_prng_key=7),
    ),
    "HiRA": ("hira", kind("Hira", BOTH, r=3)),
    "MiSS": ("miss", kind("Miss", LINEAR, r=5)),
    "MiSS, mini": ("miss", kind("Miss", LINEAR, r=4, mini_r=4, init_weights="mini")),
    "MiSS, bat": ("miss", kind("Miss", LINEAR, r=4, init_weights="bat")),
    "SHiRA": ("shira", kind("Shira", LINEAR, r=2)),
    "FourierFT": ("fourierft", kind("FourierFT", LINEAR, n_frequency=20, random_loc_seed=5)),
    "WaveFT": ("waveft", kind("WaveFT", LINEAR, n_frequency=20, random_loc_seed=5)),
    "WaveFT, as it is": (
        "waveft",
        kind("WaveFT", LINEAR, n_frequency=20, random_loc_seed=5, use_idwt=False),
    ),
    "WaveFT of Daubechies": (
        "waveft",
        kind("WaveFT", LINEAR, n_frequency=60, random_loc_seed=5, wavelet_family="db3"),
    ),
    "WaveFT of Daubechies, odd sides": (
        "waveft",
        kind("WaveFT", ["odd"], n_frequency=20, random_loc_seed=5, wavelet_family="sym4"),
    ),
    "DeLoRA": ("delora", kind("Delora", LINEAR, r=3)),
    "C3A": ("c3a", kind("C3A", LINEAR, block_size=4)),
    "GraLoRA": ("gralora", kind("Gralora", LINEAR, r=4, gralora_k=2, alpha=3)),
    "GraLoRA, and LoRA": (
        "gralora",
        kind("Gralora", LINEAR, r=4, gralora_k=2, hybrid_r=2, alpha=3),
    ),
    "RandLoRA": ("randlora", kind("RandLora", LINEAR, r=3, randlora_alpha=5)),
    "RandLoRA, sparse, by its seed": (
        "randlora",
        kind(
            "RandLora",
            ["to_out.0", "to_k"],
            r=3,
            sparse=True,
            save_projection=False,
            projection_prng_key=7,
        ),
    ),
    "RandLoRA, very sparse, by its seed": (
        "randlora",
        kind("RandLora", ["to_q", "to_k"], r=5, very_sparse=True, save_projection=False),
    ),
    "AdaLoRA": (
        "adalora",
        kind("AdaLora", BOTH, init_r=4, target_r=2, lora_alpha=5, total_step=100),
    ),
    "AdaLoRA, without alpha": (
        "adalora",
        kind("AdaLora", LINEAR, init_r=4, target_r=2, lora_alpha=0, total_step=100),
    ),
    "HRA": ("hra", kind("HRA", BOTH, r=4)),
    "HRA, orthogonal": ("hra", kind("HRA", BOTH, r=3, apply_GS=True)),
    "RoAd": ("road", kind("Road", LINEAR, variant="road_1", group_size=4)),
    "RoAd, 2": ("road", kind("Road", LINEAR, variant="road_2", group_size=8)),
    "RoAd, 4": ("road", kind("Road", LINEAR, variant="road_4", group_size=4)),
    "BEFT": ("bias", kind("Beft", ["to_q", "to_out.0"])),
    "LN tuning": ("value", kind("LNTuning", ["norm1"])),
    "VB-LoRA": ("vblora", kind("VBLoRA", LINEAR, r=3, num_vectors=6, vector_length=4, topk=2)),
    "VB-LoRA, chosen": (
        "vblora",
        kind(
            *("VBLoRA", LINEAR),
            r=3,
            num_vectors=6,
            vector_length=4,
            topk=3,
            save_only_topk_weights=True,
        ),
    ),
    "Uni-LoRA": ("unilora", kind("UniLora", LINEAR, r=3, theta_d_length=20, save_indices=True)),
    "TinyLoRA": ("tinylora", kind("TinyLora", LINEAR, r=2, u=5)),
    "TinyLoRA, shared": (
        "tinylora",
        kind("TinyLora", [*LINEAR, "odd"], r=2, u=5, weight_tying=0.5),
    ),
    "TinyLoRA, one": ("tinylora", kind("TinyLora", LINEAR, r=2, u=5, weight_tying=1.0)),
    "PVeRA": ("pvera", kind("Pvera", LINEAR, r=3)),
    "PVeRA, by its seed": (
        "pvera",
        kind("Pvera", LINEAR, r=3, save_projection=False, projection_prng_key=7),
    ),
    "OSF": ("osf", kind("OSF", LINEAR, effective_rank=4)),
    "Super": ("supertuning", kind("Supertuning", LINEAR, sparsity=0.9)),
    "Super, and a pair": (
        "supertuning",
        kind("Supertuning", LINEAR, sparsity=0.9, r=2, lora_alpha=3.0),
    ),
    "DEFT": ("deft", kind("Deft", LINEAR, r=3)),
    "DEFT, by qr": ("deft", kind("Deft", LINEAR, r=3, decomposition_method="qr", alpha=5)),
    "DEFT, PaRa": ("deft", kind("Deft", LINEAR, r=3, para=True)),
    "PEANuT": ("peanut", kind("Peanut", LINEAR, r=3)),
    "PEANuT, deep": (
        "peanut",
        kind("Peanut", LINEAR, r=3, depth=2, act_fn="gelu", scaling=0.5),
    ),
    "FRoD": ("frod", kind("Frod", LINEAR, sparse_rate=0.05, progressbar=False)),
}


def saved(config: Any, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder that PEFT saved, and what merging it changes; the base model is beside it."""
    model = layers()
    base_folder(model, folder / "base")
    torch.manual_seed(0)
    tuned = randomise(get_peft_model(model, copy.deepcopy(config)))
    tuned.save_pretrained(folder / "adapter")
    return folder / "adapter", merged_changes(tuned, layers())
