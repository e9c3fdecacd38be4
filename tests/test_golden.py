"""The same config gives the same numbers as long as the protocol version says so."""

import json

import pytest
import torch
from golden import CASES, PATH, versions

STORED = json.loads(PATH.read_text(encoding="utf-8"))
# Relative, for what other processors round otherwise (measured: 1e-4). Where a set is small, one token that falls to
# another code weighs much in how codes are used, and a little in distances between sets.
TOLERANCE = 5e-4
WIDER = dict.fromkeys(("perplexity", "usage", "dead_codes", "codes_used", "precision", "recall"), 0.03)
WIDER |= dict.fromkeys(("fid", "kid", "gfid", "gkid", "grid"), 0.005)


@pytest.mark.parametrize("name", CASES)
def test_the_same_config_gives_the_same_numbers(name):
    found, stored = CASES[name](), STORED["values"][name]
    assert found.keys() == stored.keys(), renew("other numbers than those stored are measured")
    for key, value in stored.items():
        tolerance = next((wide for start, wide in WIDER.items() if key.startswith(start)), TOLERANCE)
        wrong = f"{name}: {key} is {found[key]:.6g} and was {value:.6g}"
        assert found[key] == pytest.approx(value, rel=tolerance, abs=1e-4), renew(wrong)


def test_the_stored_numbers_are_of_these_versions():
    for name in ("PROTOCOL_VERSION", "PRIOR_VERSION"):
        assert STORED["versions"][name] == versions()[name], f"{name} was raised: renew with python -m tests.golden"


def test_every_case_is_stored_and_nothing_else():
    assert STORED["values"].keys() == CASES.keys(), renew("other cases than those stored are computed")


def renew(wrong: str) -> str:
    """What to do about it."""
    other = STORED["versions"]["torch"].partition("+")[0]
    hint = f" (stored with torch {other})" if other != torch.__version__.partition("+")[0] else ""
    return (
        f"{wrong}{hint}. Old runs would be ranked beside new ones that were trained or scored otherwise: mend it, or "
        "raise PROTOCOL_VERSION (bench/config.py) or, of priors, PRIOR_VERSION (bench/prior_config.py), and renew with "
        "python -m tests.golden"
    )
