"""What the settings of every kind of run share: limits beside the field, one check, one identity."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from bench.core.errors import UserError
from bench.core.settings import (
    LATER,
    NOT_NEGATIVE,
    Count,
    Features,
    Fraction,
    Layers,
    Natural,
    OneOf,
    Positive,
    RunId,
    Seed,
    StepShare,
    Weight,
    at_least,
    check_fields,
    check_values,
    identity,
)
from bench.tokenizers.config import make_config

COLOURS = {"red": 1, "blue": 2}


@dataclass(frozen=True)
class Toy:
    """One field of every kind."""

    count: Count = 1
    natural: Natural = 0
    weight: Weight = 0.0
    positive: Positive = 1.0
    fraction: Fraction = 0.0
    share: StepShare = 1.0
    seed: Seed = 0
    samples: Annotated[int, at_least(4)] = 4
    open: Annotated[float | None, NOT_NEGATIVE] = None
    colour: Annotated[str, OneOf(COLOURS)] = "red"
    net: Literal["alex", "vgg"] = "alex"
    name: str = "anything"
    free: float = -1.0
    switch: bool = False
    layers: Layers = 1
    features: Features = 1
    run: RunId = "cnn"


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("count", 0, "count is 0; it must be at least 1"),
        ("natural", -1, "natural is -1; it must be 0 or more"),
        ("weight", -0.5, "weight is -0.5; it must be 0 or more"),
        ("positive", 0.0, "positive is 0.0; it must be above 0"),
        ("fraction", 1.0, "fraction is 1.0; it must be at least 0 and below 1"),
        ("share", 1.5, "share is 1.5; it is a share of the steps, from 0 to 1"),
        ("seed", 2**31, "seed is 2147483648; it must be below 2**31"),
        ("seed", -1, "seed is -1; it must be 0 or more"),
        ("samples", 3, "samples is 3; it must be at least 4"),
        ("open", -1.0, "open is -1.0; it must be 0 or more"),
        ("weight", math.nan, "weight is nan; it must be 0 or more"),
        ("free", math.nan, "free is nan; it must be a finite number, up to 1e+30"),
        ("weight", math.inf, "weight is inf; it must be a finite number, up to 1e+30"),
        ("colour", "green", "unknown colour 'green'; choose from red, blue"),
        ("net", "alexa", "unknown net 'alexa'; choose from alex, vgg; perhaps alex"),
        ("net", "squeeze", "unknown net 'squeeze'; choose from alex, vgg"),
    ],
)
def test_the_first_field_that_its_type_does_not_allow_is_one_sentence(field, value, sentence):
    with pytest.raises(UserError) as raised:
        check_fields(Toy(**{field: value}))
    assert str(raised.value) == sentence


def test_what_the_types_allow_passes():
    check_fields(Toy())
    check_fields(Toy(open=0.0, seed=2**31 - 1, share=0.0, fraction=0.999, colour="blue", net="vgg", switch=True))


def test_choices_are_those_of_the_dict_when_asked(monkeypatch):
    monkeypatch.setitem(COLOURS, "green", 3)
    check_fields(Toy(colour="green"))


def test_an_identity_is_that_of_version_and_values():
    ids = {identity(1, Toy()), identity(2, Toy()), identity(1, Toy(count=2)), identity(1, Toy(name="other"))}
    assert len(ids) == 4
    assert identity(1, Toy()) == identity(1, Toy(count=1))


def test_a_later_field_is_part_of_an_identity_unless_it_stands_at_its_default():
    """So that runs of before it existed keep the ids that they have."""

    @dataclass(frozen=True)
    class Grown(Toy):
        further: Annotated[float | None, NOT_NEGATIVE, LATER] = None
        kind: Annotated[Literal["a", "b"], LATER] = "a"

    assert identity(1, Grown()) == identity(1, Toy())
    assert len({identity(1, Grown()), identity(1, Grown(further=0.0)), identity(1, Grown(kind="b"))}) == 3


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("count", "1", "count is '1'; it must be a whole number"),
        ("count", 1.0, "count is 1.0; it must be a whole number"),
        ("count", True, "count is True; it must be a whole number"),
        ("count", None, "count is None; it must be a whole number"),
        ("count", 2**31, "count is 2147483648; it must be at most 2147483647"),
        ("natural", 2**31, "natural is 2147483648; it must be at most 2147483647"),
        ("layers", 1001, "layers is 1001; it must be at most 1000"),
        ("features", 16385, "features is 16385; it must be at most 16384"),
        ("weight", [1.0], "weight is [1.0]; it must be a number or a whole number"),
        ("open", "1", "open is '1'; it must be a number or a whole number"),
        ("net", 3, "net is 3; it must be text"),
        ("name", None, "name is None; it must be text"),
        ("switch", 1, "switch is 1; it must be True or False"),
        *(("run", name, f"run is {name}; it must be the id of a run") for name in ("", ".", "..", "../x", "/x", "x/")),
    ],
)
def test_a_value_of_another_kind_or_beyond_all_use_is_one_sentence(field, value, sentence):
    """Strangers' files have any; a switch is no number, and a number no switch."""
    for check in (check_fields, check_values):
        with pytest.raises(UserError) as raised:
            check(Toy(**{field: value}))
        assert str(raised.value) == sentence


def test_limits_are_allowed_and_whole_numbers_are_numbers():
    most = {"count": 2**31 - 1, "natural": 2**31 - 1, "layers": 1000, "features": 16384}
    check_fields(Toy(**most, weight=1, positive=2, open=3, free=-4, run="cnn-ema-1.5"))


def test_choices_are_checked_apart_from_values():
    """A store is shared with versions of the code that have others."""
    check_values(Toy(colour="green", net="squeeze"))
    with pytest.raises(UserError, match="unknown colour 'green'"):
        check_fields(Toy(colour="green", net="squeeze"))


@pytest.mark.parametrize("text", ["folder:a\x07b", "folder:a\0b", "folder:\udce4", "folder:a\x9bb", "folder:\u202eb"])
def test_a_text_that_no_file_could_give_back_is_refused(text):
    """A run's config.json with it would be a damaged one."""
    with pytest.raises(UserError) as error:
        make_config("cnn", "smoke", device="cpu", data=text).check()
    assert str(error.value) == f"data is {text!a}; it must be text without control characters"
    make_config("cnn", "smoke", device="cpu", data="folder:ä\t\n 図").check()
