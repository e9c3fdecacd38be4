"""The ``--help`` of commands: what they take in groups, the essential first, and all of it with ``--help-all``.

tyro shows it; what is said of a flag is the docstring of its field, the range that its type allows, and its default.
"""

import ast
import inspect
import textwrap
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, field, fields, is_dataclass, make_dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import tyro

from .settings import ranges

ESSENTIAL = "essential"
METAVARS = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH", bool: "{True,False}"}
EVERY = tyro.conf.arg(help="show all flags and exit", help_behavior_hint="")


class Manual(NamedTuple):
    """How the flags of a command are shown. ``sections``: the group that begins with a field, by the field's name.
    ``essential`` ones come first, in that order; those of the ``tail`` only where all are asked for."""

    sections: Mapping[str, str] = {}
    essential: Collection[str] = ()
    tail: Collection[str] = ()


def wanted(words: Collection[str]) -> str | None:
    """Which of ``--help`` and ``--help-all`` the words of a command line ask for; None for neither."""
    if "--help-all" in words:
        return "--help-all"
    return "--help" if {"-h", "--help"} & {*words} else None


def show(kind: type, default: Any, prog: str, description: str | None, manual: Manual, every: bool) -> None:
    """Prints what a command takes, whose flags are the fields of the dataclass ``kind``, with the values of the
    instance ``default``, if there is one, as defaults; the tail where ``every`` flag was asked for. Exits with 0."""
    groups: dict[str, list[tuple]] = {name: [] for name in (ESSENTIAL, *manual.sections.values())}
    left_out = dict.fromkeys(groups, 0)
    hints, texts, limits, group = get_type_hints(kind, include_extras=True), docstrings(kind), ranges(kind), ""
    top, essential = [], {}
    for one in fields(kind):
        group = manual.sections.get(one.name, group)
        rules = getattr(hints[one.name], "__metadata__", ())
        if tyro.conf.Suppress in rules:
            continue
        text = "; ".join(filter(None, [texts.get(one.name, ""), limits.get(one.name, "")]))
        value = _default(one) if default is None else getattr(default, one.name)
        shown = one.name, _told(hints[one.name], text, value), field(default=value)
        if one.name in manual.essential:
            essential[one.name] = shown
        elif one.name in manual.tail and not every:
            left_out[group] += 1
        else:
            (top if tyro.conf.Positional in rules or not group else groups[group]).append(shown)
    groups[ESSENTIAL] = [essential[name] for name in manual.essential if name in essential]
    if manual.tail:
        top.append(("help_all", Annotated[bool, EVERY, tyro.conf.FlagCreatePairsOff], field(default=False)))
    for name, own in groups.items():
        if own:
            made = make_dataclass(name, own)
            made.__doc__ = f"{left_out[name]} more with --help-all" if left_out[name] else ""
            top.append((name, made, field(default_factory=made)))
    whole = make_dataclass(kind.__name__, top)
    whole.__doc__ = ""
    tyro.cli(whole, args=["--help"], prog=prog, description=description, config=(tyro.conf.OmitArgPrefixes,))


def _default(one: Field) -> Any:
    if one.default_factory is not MISSING:
        return one.default_factory()
    return tyro.MISSING if one.default is MISSING else one.default


def _told(hint: Any, text: str, value: Any) -> Any:
    """The type of a field with what --help says of it: ``text``, unless it has a help of its own, and the default
    ``value`` where there is one to speak of."""
    plain, *rules = get_args(hint) if get_origin(hint) is Annotated else [hint]
    own = next((rule for rule in rules if hasattr(rule, "help_behavior_hint")), tyro.conf.arg())
    words = " ".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}" if type(value) is float else value
    usual = "" if words in (None, "", False) or value is tyro.MISSING else f"(default: {words})"
    metavar = own.metavar or _metavar(plain)
    hint_text = usual if own.help_behavior_hint is None else own.help_behavior_hint
    told = replace(own, help=own.help or text, metavar=metavar, help_behavior_hint=hint_text)
    off = [tyro.conf.FlagCreatePairsOff] if value is False else []
    return Annotated[(plain, *(rule for rule in rules if rule is not own), told, *off)]


def _metavar(plain: Any) -> str | None:
    """What stands for the value of a field that may be open, or several; None where tyro's own word is right."""
    if get_origin(plain) is tuple:
        one = _word(get_args(plain)[0])
        return f"{one} [{one} ...]"
    return _word(plain) if NoneType in get_args(plain) else None


def _word(plain: Any) -> str:
    """What stands for one value of a type."""
    if get_origin(plain) is Literal:
        return f"{{{','.join(get_args(plain))}}}"
    if NoneType in get_args(plain):
        return _word(next(member for member in get_args(plain) if member is not NoneType))
    return METAVARS.get(plain, "STR")


def docstrings(kind: type) -> dict[str, str]:
    """The docstring below each field of the dataclass ``kind`` and those that it is derived from, in one line."""
    found = {}
    for base in reversed(kind.__mro__):
        if not is_dataclass(base):
            continue
        with suppress(OSError, TypeError):  # of a class that was made, not written
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
            for name, text in pairwise(body):
                if isinstance(name, ast.AnnAssign) and isinstance(text, ast.Expr):
                    found[name.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found
