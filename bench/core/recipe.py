"""Settings in a file: what ``--config FILE.toml`` reads, and what every run writes so that it can be repeated."""

import difflib
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from .errors import UserError
from .files import atomic_path, reason
from .settings import check_choice, check_value

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FLAG = "--config"
Recipe = Annotated[Path | None, tyro.conf.arg(name="config", metavar="FILE.toml", help_behavior_hint="")]


def from_file(
    kind: type, words: Sequence[str], checks: Mapping[str, Callable[[Any], object]] = MappingProxyType({})
) -> dict[str, Any]:
    """The values of fields of the dataclass ``kind`` that the file after --config among ``words`` has; none without
    that flag. A field that takes several values may have one alone. ``checks`` are further ones, by name, of a value.
    Raises UserError, with the file and the key."""
    named = [after for before, after in itertools.pairwise(words) if before == FLAG]
    named += [word.partition("=")[2] for word in words if word.startswith(f"{FLAG}=")]
    if not named:
        return {}
    path, hints = Path(named[-1]), get_type_hints(kind, include_extras=True)
    hidden = {name for name, hint in hints.items() if tyro.conf.Suppress in getattr(hint, "__metadata__", ())}
    known = [field.name for field in fields(kind) if field.name not in hidden and hints[field.name] != Recipe]
    values = {}
    for key, value in _read(path).items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            fix = f"perhaps it is {near[0]}" if near else "--help-all lists all that there are"
            raise UserError(f"{path}: there is no setting {key!r}; {fix}")
        try:
            values[name] = _taken(hints[name], value, key)
            for one in values[name] if isinstance(values[name], tuple) else [values[name]]:
                if not isinstance(one, Path):
                    check_value(kind, {"seeds": "seed"}.get(name, name), one)
                checks.get(name, id)(one)
        except (UserError, ValueError) as error:
            raise UserError(f"{path}: {error}") from error
    return values


def write_recipe(path: Path, settings: Mapping[str, Any]) -> None:
    """Writes ``settings``, numbers, texts, bools and lists of them, as a file for --config; those that are None, which
    are open, are left out."""
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in settings.items() if value is not None]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error, path)}; name a file of settings") from error
    except ValueError as error:  # of TOML, or of UTF-8
        raise UserError(f"{path} is no TOML: {error}") from error


def _taken(hint: Any, value: Any, key: str) -> Any:
    """``value``, which the file has of ``key``, as a field of that type has it. Raises UserError where it has none."""
    kind, of = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return _taken(of[0], value, key)
    if kind is tuple:
        return tuple(_taken(of[0], one, key) for one in (value if isinstance(value, list) else [value]))
    if kind in (Union, UnionType):
        return _taken(next(member for member in of if member is not NoneType), value, key)
    if kind is Literal:
        check_choice(key, value, of)
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if type(value) is hint or (hint is float and type(value) is int):
        return value
    words = {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, "text")
    raise UserError(f"{key} is {value!r}; it must be {words}")
