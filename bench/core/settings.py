"""What the settings of every kind of run share: limits that stand with the field, one check of them, an identity.

A config is a frozen dataclass. What a field may be is part of its type, read by ``check_fields``: a Literal, ``OneOf``
the keys of a visible dict, or a number within a ``Limit``.
"""

import difflib
import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from .errors import UserError
from .text import is_text


class Limit(NamedTuple):
    """What a number has to meet: ``holds`` says whether it does, ``words`` what to tell when it does not, ``range``
    what --help says beforehand, if anything."""

    holds: Callable[[float], bool]
    words: str
    range: str = ""


@dataclass(frozen=True, eq=False)
class OneOf:
    """The choices of a text: keys of a dict, looked up when a config is checked."""

    choices: Collection[str]


class Later(NamedTuple):
    """Marks a field that runs were once made without: at its default it is no part of their identity."""


LATER = Later()


def at_least(least: int) -> Limit:
    """Numbers from ``least`` on."""
    return Limit(lambda value: value >= least, f"it must be at least {least}", f"from {least}")


def at_most(most: int) -> Limit:
    """Numbers up to ``most``: beyond all use, but a stranger's file may ask for any."""
    return Limit(lambda value: value <= most, f"it must be at most {most}", f"up to {most}" * (most < 10_000))


WORDS = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}  # of what a field accepts
HUGE = 1e30  # beyond all use: sums and squares of larger numbers are infinite
NOT_NEGATIVE = Limit(lambda value: value >= 0, "it must be 0 or more", "from 0")
ABOVE_0 = Limit(lambda value: value > 0, "it must be above 0", "above 0")


Count = Annotated[int, at_least(1), at_most(2**31 - 1)]
Layers = Annotated[int, at_least(1), at_most(1000)]
Features = Annotated[int, at_least(1), at_most(16384)]
Natural = Annotated[int, NOT_NEGATIVE, at_most(2**31 - 1)]
Weight = Annotated[float, NOT_NEGATIVE]
Positive = Annotated[float, ABOVE_0]
IN_UNIT = Limit(lambda value: 0 <= value < 1, "it must be at least 0 and below 1", "from 0, below 1")
Fraction = Annotated[float, IN_UNIT]
IS_SHARE = Limit(lambda value: 0 <= value <= 1, "it is a share of the steps, from 0 to 1", "from 0 to 1")
StepShare = Annotated[float, IS_SHARE]
Seed = Annotated[int, NOT_NEGATIVE, Limit(lambda value: value < 2**31, "it must be below 2**31")]
IS_NAME = Limit(lambda text: text == Path(text).name and text not in ("", ".."), "it must be the id of a run")
RunId = Annotated[str, IS_NAME]
Precision = Literal["auto", "bf16", "fp32"]


def ranges(kind: type) -> dict[str, str]:
    """By name, in words, between what the numbers in fields of the dataclass ``kind``, and of those that it is derived
    from, have to be."""
    found = {}
    for base in reversed(kind.__mro__):
        for name, field in _types(base).items() if is_dataclass(base) else ():
            told = ", ".join(limit.range for limit in field.limits if limit.range)
            found |= {name: told} if told else {}
    return found


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raises UserError, with all ``choices`` and the nearest by letters, unless ``value`` is one of them."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), [*map(str, choices)], 1)
        perhaps = f"; perhaps {near[0]}" if near else ""
        raise UserError(f"unknown {name} {value!r}; choose from {', '.join(choices)}{perhaps}")


def check_fields(config: Any) -> None:
    """Raises UserError, one sentence with value and fix, on the first field of the dataclass ``config`` that its type
    does not allow; infinity and NaN never are allowed."""
    check_values(config)
    check_choices(config)


def check_choices(config: Any) -> None:
    """The part of ``check_fields`` that other versions of the code, which have other choices, may see otherwise."""
    for name, field in _types(type(config)).items():
        if field.choices is not None:
            check_choice(name, getattr(config, name), field.choices)


def check_values(config: Any) -> None:
    """``check_fields`` but for choices."""
    for name, field in _types(type(config)).items():
        _check(name, getattr(config, name), field)


def check_value(kind: type, name: str, value: Any) -> None:
    """``check_fields`` of one ``value``, as the parent of the dataclass ``kind`` that says most of the field has it."""
    first = [_types(base)[name] for base in kind.__mro__ if is_dataclass(base) and name in _types(base)][-1:]
    for field in first if name != "tokenizer" else ():  # which may be a folder, too
        _check(name, value, field)
        if field.choices is not None:
            check_choice(name, value, field.choices)


def _check(name: str, value: Any, field: "_Field") -> None:
    if type(value) not in field.accepted:
        words = " or ".join(WORDS[kind] for kind in field.accepted if kind in WORDS)
        raise UserError(f"{name} is {value!r}; it must be {words}")
    if value is None:
        return
    if isinstance(value, str) and not is_text(value):
        raise UserError(f"{name} is {value!a}; it must be text without control characters")
    for limit in field.limits:
        if not limit.holds(value):
            raise UserError(f"{name} is {value}; {limit.words}")
    if isinstance(value, float) and not abs(value) <= HUGE:
        raise UserError(f"{name} is {value}; it must be a finite number, up to {HUGE:g}")


class _Field(NamedTuple):
    """What the type of a field says."""

    accepted: tuple[type, ...]
    limits: list[Limit]
    choices: Collection[str] | None
    later: bool = False


@cache
def _types(kind: type) -> dict[str, _Field]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: _read(hints[field.name]) for field in fields(kind)}


def _read(hint: Any) -> _Field:
    rules = getattr(hint, "__metadata__", ())
    plain = get_args(hint)[0] if rules else hint
    if get_origin(plain) is Literal:
        return _Field((str,), [], get_args(plain), LATER in rules)
    accepted = get_args(plain) or (plain,)  # of a union its members
    accepted += (int,) if float in accepted else ()
    choices = [rule.choices for rule in rules if isinstance(rule, OneOf)]
    limits = [rule for rule in rules if isinstance(rule, Limit)]
    return _Field(accepted, limits, choices[0] if choices else None, LATER in rules)


def identity(version: int, config: Any, packages: Collection[str] = ()) -> str:
    """64 hexadecimal digits that stand for the resolved dataclass ``config`` under one version of its protocol, and for
    the ``packages``, with their versions, that what it names comes from."""
    later = {name for name, field in _types(type(config)).items() if field.later}
    values = {
        field.name: value
        for field in fields(config)
        if (value := getattr(config, field.name)) != field.default or field.name not in later
    }
    return hashlib.sha256(json.dumps([version, values, *packages], sort_keys=True).encode()).hexdigest()
