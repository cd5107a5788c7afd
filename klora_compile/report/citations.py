"""What a model card says of each rule: its name, what it does, and the papers to cite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """One publication."""

    where: str
    """In a few words, as Markdown."""
    link: str
    bibtex: str


@dataclass(frozen=True)
class Cited:
    """A rule in a card."""

    title: str
    sentence: str
    """What it does, without a full stop, as Markdown."""
    papers: tuple[Paper, ...] = ()


def _preprint(number: str, key: str, title: str, author: str = "") -> Paper:
    fields = {"title": title, "author": author, "eprint": number, "archivePrefix": "arXiv"}
    lines = [f"  {name:<13} = {{{value}}}," for name, value in fields.items() if value]
    bibtex = "\n".join([f"@misc{{{key},", *lines, "}"])
    return Paper(f"arXiv:{number}", f"https://arxiv.org/abs/{number}", bibtex)


_KLORA = Paper(
    "Ouyang et al., CVPR 2025, arXiv:2502.18461",
    "https://arxiv.org/abs/2502.18461",
    """@inproceedings{ouyang2025klora,
  title     = {K-LoRA: Unlocking Training-Free Fusion of Any Subject and Style LoRAs},
  author    = {Ouyang, Ziheng and Li, Zhen and Hou, Qibin},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern
               Recognition (CVPR)},
  year      = {2025}
}""",
)
_EST = _preprint("2508.02165", "estlora2025", "EST-LoRA")
_NP = _preprint(
    "2511.11051",
    "chen2025nplora",
    "NP-LoRA: Null Space Projection Unifies Subject and Style in LoRA Fusion",
    "Chen, Chuheng and Zhou, Xiaofei and Zhang, Geyuan and Huang, Yong",
)
_SWITCH = _preprint(
    "2402.16843", "zhong2024multilora", "Multi-LoRA Composition for Image Generation"
)

_EVERY_LAYER = "In every layer of the denoiser, at every step of sampling, the one acts"

#: Name of a rule -> its words.
CITATIONS: Mapping[str, Cited] = {
    "klora": Cited("K-LoRA", f"{_EVERY_LAYER} whose largest weights matter more", (_KLORA,)),
    "est": Cited("EST-LoRA", f"{_EVERY_LAYER} whose delta has more energy", (_EST,)),
    "np": Cited(
        "NP-LoRA", "Both act at every step, the subject off the inputs that the style uses", (_NP,)
    ),
    "np+klora": Cited(
        "NP-LoRA and K-LoRA",
        f"The subject keeps off the inputs that the style uses. {_EVERY_LAYER} whose largest "
        "weights matter more",
        (_NP, _KLORA),
    ),
    "direct": Cited("their sum", "All act at every step, at constant weights"),
    "switch": Cited("LoRA Switch", "One acts at a time, for some steps each, in turns", (_SWITCH,)),
    "phases": Cited("a schedule by hand", "Each has its own weight from one phase to the next"),
}
