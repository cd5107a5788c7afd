"""The subjects and styles, and those that the base model never saw."""

from __future__ import annotations

#: Word in prompts -> package of drawings.
TRAINING_STYLES = {
    "noto": "noto",
    "twemoji": "twemoji",
    "flat": "fluent-emoji-flat",
    "blob": "noto-v1",
}
HELD_OUT_STYLES = {
    "ink": "fluent-emoji-high-contrast",
    "soft": "fluent-emoji",
    "firefox": "fxemoji",
}
STYLES = TRAINING_STYLES | HELD_OUT_STYLES

#: Word in prompts = name of the drawing in the packages.
HELD_OUT_SUBJECTS = tuple(
    """
    penguin octopus mushroom rocket cactus frog pineapple guitar tractor headphone rooster telescope
    """.split()
)
#: Settings are chosen on the first half; reported results are measured on the second.
TUNING_SUBJECTS, REPORTED_SUBJECTS = HELD_OUT_SUBJECTS[::2], HELD_OUT_SUBJECTS[1::2]

TRAINING_SUBJECTS = tuple(
    """
    fox cat dog owl banana house crown snowman bear bell bird bread bus camera candle cherries
    chicken cloud cow crocodile dolphin doughnut elephant fish ghost grapes hamburger hammer
    honeybee horse key koala lemon lollipop melon monkey mouse peach pear pig rainbow ring rose
    sailboat skull snail snake spider strawberry sunflower tent tiger tulip turtle umbrella
    whale airplane anchor avocado balloon bat bomb butterfly carrot castle cookie crab
    croissant dragon duck eggplant lion lizard panda pizza rabbit robot scorpion shark tomato
    trophy unicorn watermelon wolf
    """.split()
)


def prompt(subject: str, style: str) -> str:
    """Return the prompt of a drawing in training and sampling."""
    return f"a {subject}, {style} style"
