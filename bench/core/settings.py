"""What the settings of every kind of run share: limits that stand with the field, one check of them, an identity.

A config is a frozen dataclass. What a field may be is part of its type, read by ``check_fields``: a Literal, ``OneOf``
the keys of a visible dict, or a number within a ``Limit``.
"""

import hashlib
import json
import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from .errors import UserError


class Limit(NamedTuple):
    """What a number has to meet: ``holds`` says whether it does, ``words`` what to tell when it does not."""

    holds: Callable[[float], bool]
    words: str


@dataclass(frozen=True, eq=False)
class OneOf:
    """The choices of a text: keys of a dict, looked up when a config is checked."""

    choices: Collection[str]


def at_least(least: int) -> Limit:
    """Numbers from ``least`` on."""
    return Limit(lambda value: value >= least, f"it must be at least {least}")


NOT_NEGATIVE = Limit(lambda value: value >= 0, "it must be 0 or more")

Count = Annotated[int, at_least(1)]
Natural = Annotated[int, NOT_NEGATIVE]
Weight = Annotated[float, NOT_NEGATIVE]
Positive = Annotated[float, Limit(lambda value: value > 0, "it must be above 0")]
Fraction = Annotated[float, Limit(lambda value: 0 <= value < 1, "it must be at least 0 and below 1")]
StepShare = Annotated[float, Limit(lambda value: 0 <= value <= 1, "it is a share of the steps, from 0 to 1")]
Seed = Annotated[int, NOT_NEGATIVE, Limit(lambda value: value < 2**31, "it must be below 2**31")]
Precision = Literal["auto", "bf16", "fp32"]


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raises UserError, with all ``choices``, unless ``value`` is one of them."""
    if value not in choices:
        raise UserError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")


def check_fields(config: Any) -> None:
    """Raises UserError, one sentence with value and fix, on the first field of the dataclass ``config`` that its type
    does not allow. None leaves a field open and is always allowed; infinity and NaN never are."""
    types = _types(type(config))
    for field in fields(config):
        value, kind = getattr(config, field.name), types[field.name]
        if value is None:
            continue
        if get_origin(kind) is Literal:
            check_choice(field.name, value, get_args(kind))
        for rule in getattr(kind, "__metadata__", ()):
            if isinstance(rule, OneOf):
                check_choice(field.name, value, rule.choices)
            elif not rule.holds(value):
                raise UserError(f"{field.name} is {value}; {rule.words}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{field.name} is {value}; it must be a finite number")


@cache
def _types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def identity(version: int, config: Any) -> str:
    """64 hexadecimal digits that stand for the resolved dataclass ``config`` under one version of its protocol."""
    return hashlib.sha256(json.dumps([version, asdict(config)], sort_keys=True).encode()).hexdigest()
