"""Whatever a file or a command line holds: one sentence, or a result, and nothing in it is executed.

Hypothesis makes up the files: whole ones with a byte changed or cut off, JSON of any shape in place of another, noise.
"""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from bench.analysis import report
from bench.analysis.frames import read
from bench.core.errors import UserError
from bench.core.store import Store
from bench.data import load
from bench.run import RunArguments
from bench.sweeps.index import Index, rebuild
from bench.tokenizers.arguments import parse
from bench.tokenizers.config import Config, make_config
from bench.training.loop import resumed, save
from tests.fabricate import fabricate, fabricate_failed

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [field.name for field in fields(Config)]
FUZZ = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def mistake(call: Callable[[], object]) -> str | None:
    """What the user is told, if ``call`` ends in a mistake."""
    try:
        call()
    except UserError as error:
        return str(error)
    return None


def leaves(tree: object, path: tuple = ()) -> list[tuple]:
    """The way to everything in nested dicts and lists."""
    found = [path]
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            found += leaves(value, (*path, key))
    return found


def replaced(tree: object, path: tuple, value: object) -> object:
    """``tree`` with ``value`` at the end of ``path``."""
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = replaced(copy[path[0]], path[1:], value)
    return copy


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """``whole`` with bytes changed, cut off, or nothing of it; of JSON also with any value at any place."""
    kinds = ["flip", "cut", "noise"] + (["value"] * 3 if whole[:1] == b"{" and b"\n{" not in whole else [])
    match draw(st.sampled_from(kinds)):
        case "flip":
            place = draw(st.integers(0, len(whole) - 1))
            return whole[:place] + bytes([whole[place] ^ draw(st.integers(1, 255))]) + whole[place + 1 :]
        case "cut":
            return whole[: draw(st.integers(0, len(whole)))]
        case "noise":
            return draw(st.binary(max_size=200))
        case _:
            tree = json.loads(whole)
            return json.dumps(replaced(tree, draw(st.sampled_from(leaves(tree))), draw(JSON))).encode()


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Store:
    """A store of one finished and one failed run, and a study of them."""
    store = Store(tmp_path_factory.mktemp("kept"))
    runs = [fabricate(store, make_config("cnn", "smoke", seed=seed)) for seed in (0, 1)]
    fabricate_failed(store, make_config("cnn", "smoke", seed=2))
    rows = {run.folder.name: {"backbone": "cnn", "beta": 0.25, "seed": seed} for seed, run in enumerate(runs)}
    store.extend_study("one", {"kind": "ablation", "sweep": ["beta"], "metrics": ["psnr"], "space": {}}, rows)
    return store


@pytest.mark.parametrize("name", ["config.json", "metrics.json", "failure.json", "history.jsonl"])
@FUZZ
@given(data=st.data())
def test_a_run_folder_is_read_or_named(kept, tmp_path, name, data):
    """The others are read whatever it holds, and a damaged one has a sentence that names its file."""
    store = Store(tmp_path / "store")
    shutil.rmtree(store.root, ignore_errors=True)
    shutil.copytree(kept.root, store.root)
    path = next(run.folder / name for run in store.runs() if (run.folder / name).is_file())
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    table, unread = read(store.runs())
    assert len(table) + len(unread) == 3
    for sentence in [*unread, *table.reason[table.status == "damaged"]]:
        assert str(path) in sentence
        assert "move it away" in sentence
    report.contents(report.Selection("all", store.runs(), store.root), table, table.iloc[:0], unread)
    store.runs()[0].history()


@FUZZ
@given(data=st.data())
def test_a_study_is_read_or_named(kept, tmp_path, data):
    store = Store(tmp_path / "store")
    shutil.rmtree(store.root, ignore_errors=True)
    shutil.copytree(kept.root, store.root)
    path = store.root / "studies" / "one.json"
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    (tmp_path / "x.db").unlink(missing_ok=True)
    told = mistake(lambda: rebuild(Index(f"sqlite:///{tmp_path / 'x.db'}", tmp_path), store, "one"))
    assert told is None or str(path) in told or "study one-" in told
    assert (mistake(lambda: report.select(["one"], store.root)) or "").count("\n") == 0


@FUZZ
@given(
    words=st.lists(
        st.sampled_from([f"--{name.replace('_', '-')}" for name in FIELDS])
        | st.sampled_from(["cnn", "vit", "--preset", "smoke", "--match", "params:1M", "--seeds"])
        | st.text(max_size=6)
        | st.integers().map(str)
        | st.floats().map(str),
        max_size=6,
    )
)
def test_a_command_line_is_a_config_or_a_mistake(words):
    """tyro ends with code 2 on what it cannot read; what it can is checked in one sentence."""
    with suppress(SystemExit):
        mistake(lambda: [one.check() for one in parse(RunArguments, [*words, "--device", "cpu"], "fuzz", "").configs()])


@FUZZ
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_a_config_of_anything_is_checked_in_one_sentence(changes):
    told = mistake(Config(**{**vars(make_config("cnn", "smoke", device="cpu")), **changes}).check)
    assert told is None or any(name in told for name in changes)


@FUZZ
@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
def test_an_image_is_decoded_or_skipped(tmp_path, monkeypatch, data, kind):
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "images"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    for number in range(3):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    whole = io.BytesIO()
    Image.fromarray(pixels).save(whole, kind)
    (folder / "3.png").write_bytes(data.draw(damaged(whole.getvalue())))
    told = mistake(lambda: load(f"folder:{folder}", 8))
    assert told is None or "3.png" in told


@FUZZ
@given(data=st.data())
def test_a_checkpoint_is_restored_starts_again_or_is_refused(tmp_path, data):
    path, config, model = tmp_path / "checkpoint.pt", make_config("cnn", "smoke", device="cpu"), nn.Linear(3, 2)
    save(path, {"model": model}, 7, 1.5)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    fresh = nn.Linear(3, 2)
    found = []
    told = mistake(lambda: found.append(resumed(path, {"model": fresh}, config)))
    assert told is None or "no checkpoint of this run" in told
    assert found in ([(7, 1.5)], [(0, 0.0)], [])
    if found == [(7, 1.5)]:
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
