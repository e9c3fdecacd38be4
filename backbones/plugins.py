"""What other packages offer: entry points of the groups ``vqbench.backbones``, ``vqbench.quantizers``, and so on."""

import warnings
from collections.abc import Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

GROUPS = ("backbones", "quantizers", "priors", "metrics", "data")

_OURS: dict[str, set[str]] = {}  # names that no package can take, by group


@cache
def _offered() -> dict[str, dict[str, EntryPoint]]:
    """Entry points by group and name: all at once, as a look at what is installed takes some milliseconds."""
    found, every = {}, entry_points()
    for group in GROUPS:
        points = sorted(every.select(group=f"vqbench.{group}"), key=lambda one: one.name)
        found[group] = {point.name: point for point in points}
    return found


def plugged(group: str, own: dict[str, Any]) -> dict[str, Any]:
    """By name, what packages offer in a ``group`` (backbones, quantizers, priors, metrics or data) beside our ``own``,
    which keep their names. Warns of what cannot be loaded, and leaves it out: it may break no command but its own."""
    _OURS[group], found = {*own}, {}
    for name, point in _offered()[group].items():
        try:
            if name in own:
                raise ValueError("there is one of that name")
            found[name] = point.load()
        except Exception as error:  # anything that a stranger's package may raise
            whose = point.dist.name if point.dist else point.value
            warnings.warn(f"{name!r} of {whose} in vqbench.{group} is left out: {error}", stacklevel=2)
    return found


def packages(groups: Sequence[str] = GROUPS) -> dict[str, str]:
    """The packages that offer anything in ``groups``, and their versions, by name."""
    offered = (point.dist for group in groups for point in _offered()[group].values())
    return dict(sorted((dist.name, dist.version) for dist in offered if dist))


def version_of(group: str, name: str) -> str:
    """The package that ``name`` of a ``group`` comes from, and its version; empty for what is ours."""
    point = _offered()[group].get(name) if name not in _OURS.get(group, ()) else None
    return f"{point.dist.name} {point.dist.version}" if point and point.dist else ""
