"""One trial on several processes is the trial of one: curves, codebooks and scores, up to rounding.

Processes are real ones that meet over gloo; each world trains all cases in turn, since starting it takes longest.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from bench import prior
from bench.core import group, progress
from bench.core.errors import Damaged, Interrupted, UserError
from bench.core.progress import SafeConsole
from bench.core.store import Store
from bench.quantizers import QUANTIZERS
from bench.tokenizers.config import Config, make_config
from bench.tokenizers.evaluate import score
from bench.tokenizers.train import TokenizerLearner, train
from bench.tokenizers.trial import run_trial
from bench.training.loop import fit
from studies.beta import STUDY, main

pytestmark = pytest.mark.xdist_group("worlds")
SIZES = {"image_size": 16, "grid_size": 4, "codebook_size": 16, "code_dim": 4, "width": 8, "depth": 1}
TINY = {**SIZES, "steps": 4, "batch_size": 6, "warmup": 1, "lpips_weight": 0.0, "device": "cpu", "precision": "fp32"}
GAN = {"gan_weight": 0.5, "gan_start": 0.25, "gan_warmup": 0.25, "gan_ramp": 0.0, "gan_width": 8, "gan_layers": 1}
CASES: dict[str, Config] = {
    **{name: make_config("cnn", "smoke", quantizer=name, **TINY) for name in QUANTIZERS},
    "revived": make_config("cnn", "smoke", **TINY, revive_after=1),
    "entropy": make_config("cnn", "smoke", **TINY, quantizer="standard", entropy_weight=0.1, kmeans_init=True),
    "bit entropy": make_config("cnn", "smoke", **TINY, quantizer="bsq", entropy_weight=0.1),
    "blog": make_config("vit", "smoke", **TINY, augment="blog"),
    "gan": make_config("cnn", "smoke", **TINY, **GAN),
    "gan, all terms": make_config("cnn", "smoke", **TINY, **GAN, lecam_weight=0.1, r1_weight=1.0, gan_norm="spectral"),
}
SCORED = ("ema", "kl", "none")  # of codes, of bits that are measured, of neither
WORLDS = (2, 3)


def images() -> np.ndarray:
    """Smooth ones: (40, 16, 16, 3) uint8."""
    coarse = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(4, 1).repeat(4, 2)


def run(folder: Path) -> None:
    """Trains and scores every case, as one process or as one of several."""
    for name, config in CASES.items():
        place = folder / name
        if group.first():
            place.mkdir(parents=True)
        tokenizer, _ = train(config.resolved(), images(), place)
        if group.first():
            torch.save(tokenizer.state_dict(), place / "weights.pt")
        if name in SCORED:
            codes = config.codebook_size if config.discrete else None
            scores, per_image = score(tokenizer, codes, images().repeat(2, 0).repeat(2, 1).repeat(2, 2), together=True)
            assert bool(scores) == group.first()
            (place / "scores.json").write_text(json.dumps({**scores, "count": len(per_image["psnr"])})) if scores else 0


def process(rank: int, world: int, port: int, folder: Path) -> None:
    """The life of one of ``world`` processes."""
    environ(rank, world, port)
    with group.joined("cpu"):
        run(folder)


def environ(rank: int, world: int, port: int) -> None:
    """What torchrun would do before."""
    torch.set_num_threads(1)
    there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in there.items()}
    group.hush()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> Iterator[dict[int, Path]]:
    """Folders of what 1, 2 and 3 processes made."""
    root = tmp_path_factory.mktemp("worlds")
    run(root / "1")
    for world in WORLDS:
        mp.spawn(process, (world, free_port(), root / str(world)), nprocs=world)
    return {world: root / str(world) for world in (1, *WORLDS)}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES)
def test_curves_and_weights_are_those_of_one_process(worlds, case, world):
    alone, together = (worlds[number] / case for number in (1, world))
    assert len(rows(alone)) == CASES[case].steps
    for one, other in zip(rows(alone), rows(together), strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"seconds"}:
            assert other[name] == pytest.approx(one[name], rel=2e-4, abs=2e-6), name
    weights = [torch.load(place / "weights.pt", weights_only=True) for place in (alone, together)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", SCORED)
def test_scores_are_those_of_one_process(worlds, case, world):
    """80 images are three batches, of which one process has two, or each one."""
    one, other = (json.loads((worlds[number] / case / "scores.json").read_text()) for number in (1, world))
    assert one.keys() == other.keys()
    assert one["count"] == other["count"] == 80
    for name in one:
        assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name


# ------------------------------------------------------------------------------------------------------ what goes wrong

LONG = make_config("cnn", "smoke", **{**TINY, "steps": 40}).resolved()


def stepping(fault: Callable[[], None], at: int) -> type[TokenizerLearner]:
    """A learner that does ``fault`` before step ``at``."""

    class Faulty(TokenizerLearner):
        def step(self, step: int, rate: float) -> dict[str, torch.Tensor]:
            if step == at:
                fault()
            return super().step(step, rate)

    return Faulty


FAULTS: dict[str, Callable[[], None]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "silent": lambda: time.sleep(60),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "nothing": lambda: None,
}


def faulty(rank: int, port: int, folder: Path, fault: str) -> None:
    """One of two processes, of which the second has a ``fault`` in the middle; what the first says goes into a file."""
    group.PATIENCE = timedelta(seconds=5)
    learner = stepping(FAULTS[fault], 20) if rank else TokenizerLearner

    def work() -> None:
        with group.joined("cpu"):
            model, _ = fit(learner(LONG, images()), "a", folder, checkpoint_seconds=0)
        torch.save(model.state_dict(), folder / f"{rank}.pt")

    environ(rank, 2, port)
    try:
        work()
    except (UserError, Interrupted) as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "silent", "stopped"])
def test_what_ends_one_process_ends_all_and_one_process_goes_on_from_there(tmp_path, fault):
    """In a bounded time, with a sentence; and to the weights of a run that nothing befell."""
    began = time.monotonic()
    context = mp.spawn(faulty, (free_port(), tmp_path, fault), nprocs=2, join=False)
    context.processes[0].join(50)
    assert not context.processes[0].is_alive()
    assert time.monotonic() - began < 50
    for one in context.processes:
        one.kill()
    said = (tmp_path / "0.txt").read_text()
    if fault == "stopped":
        assert said == "Interrupted: stopped at step 21 of 40; the same command continues from there"
    else:
        assert re.fullmatch(r"Lost: another process of this trial ended or is silent \(.*\); the same .*", said)
    assert 19 <= rows(tmp_path)[-1]["step"] <= 21
    shutil.copytree(tmp_path, tmp_path / "two")
    model, _ = train(LONG, images(), tmp_path)
    whole, _ = train(LONG, images(), tmp_path, resume=False)
    found = [model.state_dict()]
    if fault == "stopped":  # two go on as well, which both have what the first read
        mp.spawn(faulty, (free_port(), tmp_path / "two", "nothing"), nprocs=2)
        found += [torch.load(tmp_path / "two" / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for state in found:
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4, msg=name)


def quarrel(rank: int, port: int, folder: Path) -> None:
    """One of two processes that do not agree; what it is told goes into a file."""

    def refuse(who: int) -> int:
        if rank == who:
            raise UserError("no images")
        return 7

    def busy() -> None:
        raise Damaged("x.json", "it is gone")

    works = [
        lambda: group.in_turn(lambda: refuse(1)),
        lambda: group.in_turn(lambda: refuse(0)),
        lambda: group.by_first(lambda: refuse(0)),
        lambda: group.by_first(lambda: refuse(1)),
        lambda: group.check_alike(images="ab"[rank], settings="c"),
        lambda: group.by_first(busy),
        lambda: group.in_turn(busy),
    ]
    environ(rank, 2, port)
    told = []
    with group.joined("cpu"):
        for work in works:
            try:
                told.append(work())
            except Damaged as error:
                told.append(f"damaged: {error}")
            except UserError as error:
                told.append(str(error))
    (folder / f"{rank}.json").write_text(json.dumps(told))


@pytest.mark.slow
def test_what_one_process_cannot_do_is_an_error_of_all(tmp_path):
    """So that none waits for another, the first can tell it, and a study knows what it is."""
    mp.spawn(quarrel, (free_port(), tmp_path), nprocs=2)
    alike = "process 1 has other images than the first, b and not a; give all machines the same"
    first = ["process 1: no images", "no images", "no images", 7, alike]
    damaged = ["damaged: x.json is damaged: it is gone; move it away and run the same command again"] * 2
    assert json.loads((tmp_path / "0.json").read_text()) == [*first, *damaged]
    assert json.loads((tmp_path / "1.json").read_text()) == [*first[:3], None, alike, *damaged]


@pytest.mark.slow
def test_torchrun_gives_the_runs_that_one_process_gives(image_folder, tmp_path):
    """Two in one command, written and told once; a finished one is shown again."""
    size = ("--width", "8", "--depth", "1", "--codebook-size", "16", "--code-dim", "4", "--steps", "6")
    size = (*size, "--batch-size", "8", "--lpips-weight", "0")
    words = ["--preset", "smoke", *size, "--precision", "fp32", "--device", "cpu", "--instruments", "robustness"]
    words = ["-m", "bench.run", "--backbone", "cnn", "vit", *words, "--data", f"folder:{image_folder}"]

    def told(store: Path, *launcher: str) -> str:
        command = [sys.executable, *launcher, *words, "--results", str(store)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    several = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    for said in ("finished: ", "already finished: "):
        text = told(tmp_path / "two", *several)
        assert text.count(f"\n{said}") == 2
        assert text.count("Protocol ") == 1
    told(tmp_path / "one")
    one, two = ({run.folder.name: run for run in Store(tmp_path / name).runs()} for name in ("one", "two"))
    assert len(one) == 2
    assert one.keys() == two.keys()
    for name, run in two.items():
        assert run.environments()[-1]["processor"].startswith("2 × ")
        for metric in ("psnr", "lpips_vgg", "fid_vgg16", "perplexity"):
            assert run.metrics()[metric] == pytest.approx(one[name].metrics()[metric], rel=2e-3), metric
        assert {path.name for path in run.folder.iterdir()} == {path.name for path in one[name].folder.iterdir()}


def test_batch_norm_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(group, "size", lambda: 2)
    config = make_config("timm:resnet18", "smoke", device="cpu", width=8, depth=1)
    with pytest.raises(UserError, match="'timm:resnet18' normalises the images of a batch together; train it in one"):
        run_trial(config, tmp_path)


def test_what_several_processes_cannot_do_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for name in group.NEEDED:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is 3, and there is no RANK to meet the others by; start with"):
        group.joined("cpu").__enter__()
    assert prior.main(["x"]) == 2
    assert "bench.prior works in one process, and WORLD_SIZE is 3" in " ".join(capsys.readouterr().err.split())
    assert main(STUDY, "") == 2
    assert "a study works in one process" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(group, "size", lambda: 3)
    with pytest.raises(UserError, match="batch_size 16 cannot be shared evenly by 3 processes; take 15"):
        run_trial(make_config("cnn", "smoke", device="cpu"), tmp_path)


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    group.check_gpus("cuda", 2)
    group.check_gpus("cpu", 3)
    for device, processes in (("cuda", 3), ("cuda:0", 1)):
        with pytest.raises(UserError, match="each process takes a GPU of its own, and this machine has 2; start"):
            group.check_gpus(device, processes)


def test_all_but_the_first_print_nothing(monkeypatch):
    for name in ("console", "stdout"):
        monkeypatch.setattr(progress, name, SafeConsole())
    monkeypatch.setenv("RANK", "1")
    group.hush()
    assert not progress.stdout.quiet  # alone, whatever its number
    monkeypatch.setenv("WORLD_SIZE", "2")
    group.hush()
    assert progress.stdout.quiet
    assert progress.console.quiet


@pytest.mark.parametrize("count", [1, 7, 12])
def test_shares_are_all_rows_once(monkeypatch, count):
    monkeypatch.setattr(group, "size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(group, "rank", lambda rank=rank: rank)
        shares.append([*range(count)[group.share(count)]])
    assert [row for part in shares for row in part] == [*range(count)]
    assert len(shares[0]) == max(map(len, shares)) <= min(map(len, shares)) + 1
