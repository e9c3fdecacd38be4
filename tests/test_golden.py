"""The same config gives the same numbers as long as the protocol version says so."""

import json

import pytest
import torch

from tests import golden
from tests.golden import CASES, PATH, same, versions

STORED = json.loads(PATH.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CASES)
def test_the_same_config_gives_the_same_numbers(name):
    assert name in STORED["values"], "not stored yet: python -m tests.golden adds it"
    found, stored = CASES[name](), STORED["values"][name]
    assert found.keys() == stored.keys(), "other metrics than those stored: renew with python -m tests.golden"
    for key, value in stored.items():
        assert same(key, found[key], value), renew(f"{name}: {key} is {found[key]:.6g} and was {value:.6g}")


def test_the_stored_numbers_are_of_these_versions():
    for name in ("PROTOCOL_VERSION", "PRIOR_VERSION"):
        assert STORED["versions"][name] == versions()[name], f"{name} was raised: renew with python -m tests.golden"


def test_every_case_is_stored_and_nothing_else():
    assert STORED["values"].keys() == CASES.keys(), "other cases than those stored: renew with python -m tests.golden"


def test_numbers_that_moved_are_not_renewed_under_the_same_version(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(golden, "PATH", tmp_path / "golden.json")
    monkeypatch.setattr(golden, "CASES", {"a": lambda: {"psnr": 20.0, "ssim": 0.5}})

    def store(psnr: float, version: int) -> dict:
        stored = {"versions": {**versions(), "PROTOCOL_VERSION": version}, "values": {"a": {"psnr": psnr, "ssim": 0.5}}}
        golden.PATH.write_text(json.dumps(stored))
        return stored

    now = versions()["PROTOCOL_VERSION"]
    rounded = store(20.0001, now)
    assert golden.main() == 0
    assert json.loads(golden.PATH.read_text()) == rounded  # kept
    moved = store(19.0, now)
    assert golden.main() == 2
    assert "1 numbers moved: a: psnr" in capsys.readouterr().out
    assert json.loads(golden.PATH.read_text()) == moved
    assert golden.main(only_defaults=True) == 0
    assert json.loads(golden.PATH.read_text())["values"]["a"]["psnr"] == 20.0
    store(19.0, now - 1)
    assert golden.main() == 0
    assert json.loads(golden.PATH.read_text())["versions"] == versions()


def renew(wrong: str) -> str:
    """What to do about it."""
    other = STORED["versions"]["torch"].partition("+")[0]
    hint = f" (stored with torch {other})" if other != torch.__version__.partition("+")[0] else ""
    return (
        f"{wrong}{hint}. Fix it. Where it is meant, old runs must not be ranked beside new ones that were trained or "
        "scored otherwise: raise PROTOCOL_VERSION (bench/tokenizers/config.py) or, for priors, PRIOR_VERSION "
        "(bench/priors/config.py), and renew with python -m tests.golden. Where only a default of a config changed, "
        "its runs have other ids in any case: renew with python -m tests.golden --only-defaults"
    )
