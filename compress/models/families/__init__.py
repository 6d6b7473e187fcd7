"""The family table: everything that is true of one model family, and nowhere else.

It is split as transformers splits its models: vision towers (towers.py), text models (texts.py), and what joins the two
(joins.py); `find_family` puts the rows of a config together. How one is added: CONTRIBUTING.md. No torch is imported.
"""

from slimvlm.compress.models.families.compose import CARRIED, FAMILIES, MODALITIES, compose, find_family
from slimvlm.compress.models.families.joins import JOINS
from slimvlm.compress.models.families.rows import (
    Attention,
    Experts,
    Export,
    Family,
    Join,
    Mixer,
    Mlp,
    Part,
    Resampler,
    Text,
    Tower,
)
from slimvlm.compress.models.families.texts import TEXTS
from slimvlm.compress.models.families.towers import TOWERS

__all__ = [
    "CARRIED",
    "FAMILIES",
    "JOINS",
    "MODALITIES",
    "TEXTS",
    "TOWERS",
    "Attention",
    "Experts",
    "Export",
    "Family",
    "Join",
    "Mixer",
    "Mlp",
    "Part",
    "Resampler",
    "Text",
    "Tower",
    "compose",
    "find_family",
]
