"""What settings, their values and metrics are called in charts, tables and captions."""

from typing import Any

import pandas as pd

from bench.core.files import FILES

from .frames import METRICS

BITS = ("codebook_size", "grid_size")  # the settings that change the bits of an image
FIELD_LABELS = {"beta": "β", "codebook_size": "K", "grid_size": "grid size", "code_dim": "d", "lr": "learning rate"}


def label_of(name: str) -> str:
    """A setting or metric as an axis calls it; the arrow points where it gets better."""
    if name in METRICS:
        return f"{METRICS[name].label} {METRICS[name].arrow}".strip()
    return FIELD_LABELS.get(name, name.replace("_", " "))


def brief(value: Any) -> str:
    """A value in few characters; of a path its last part."""
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value)
    text = text.rpartition("/")[2] if text.partition(":")[0] in (*FILES, "hf") else text
    return text if len(text) <= 24 else f"{text[:8]}…"


def told(row: pd.Series, name: str) -> str:
    """A metric of a run, or of several on average, with its label."""
    return f"{METRICS[name].label} {row[name]:{METRICS[name].form}}"


def at_words(fixed: dict[str, Any]) -> str:
    """At which values settings are fixed, after a comma; nothing where none is."""
    pairs = ", ".join(f"{label_of(name)} = {brief(value)}" for name, value in fixed.items())
    return f", at {pairs}" if fixed else ""
