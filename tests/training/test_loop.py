"""The loop: resumable, interruptible, honest about divergence, and what it logs; seen with a toy tokenizer."""

import json
import math
import os
import pickle
import signal
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench.core.errors import Diverged, Interrupted, UserError
from bench.tokenizers import train as module
from bench.tokenizers.config import make_config
from bench.training import loop
from bench.training.loop import Window, learning_rate, parameter_groups, rewind, step_seed
from tests.watched import Crash, Toy, adamw, checkpoint, rows, same, tensors


@pytest.fixture
def tiny(tiny):
    """In the same arithmetic on every machine."""
    return replace(tiny, precision="fp32")


def test_seconds_are_those_of_the_steps_and_include_earlier_parts(watch, tiny, toys):
    """Not those of the start; on a clock that moves by one second a step."""
    watch.clock = 1000.0
    with pytest.raises(Crash):
        watch.train(tiny, crash_at=7)
    watch.clock += 5000.0  # the pause is nobody's
    trained = watch.train(tiny)
    assert trained.seconds == 12.0
    assert [row["seconds"] for row in trained.rows] == list(range(1, 13))


def test_a_run_that_had_ended_is_not_trained_on(watch, tiny):
    first = watch.train(tiny)
    again = watch.train(tiny)
    assert again.steps == []
    assert again.seconds == first.seconds == 12.0
    assert same(again.weights, first.weights)
    assert len(again.rows) == 12


def test_resume_continues_the_history_without_gaps_or_repeats(watch, tiny, toys):
    with pytest.raises(Crash):
        watch.train(tiny, "parts", crash_at=6)
    with (watch.folder / "parts/history.jsonl").open("a") as file:
        file.write('{"step": 7, "reconstruction": 1.0}\n{"step": 8, "reconst')  # beyond the checkpoint; torn
    parts, whole = watch.train(tiny, "parts"), watch.train(tiny, "whole")
    assert parts.rows == whole.rows
    assert [row["step"] for row in whole.rows] == list(range(1, 13))
    names = {"step", "lr", "reconstruction", "quantizer", "grad_norm", "distortion", "perplexity", "codes_used"}
    assert whole.rows[0].keys() == names | {"seconds"}


def test_rewind_keeps_whole_rows_up_to_the_step(tmp_path):
    history = tmp_path / "history.jsonl"
    rewind(history, 3)
    assert history.read_text() == ""
    lines = [json.dumps({"step": step}) for step in (1, 2, 3, 4)]
    history.write_text("\n".join(lines) + '\n{"step": 3, "x')
    rewind(history, 3)
    assert history.read_text() == "\n".join(lines[:3]) + "\n"


def test_no_resume_starts_again(watch, tiny, toys):
    config = replace(tiny, steps=4)
    whole = watch.train(config, "whole")
    watch.train(tiny, "other")
    other = watch.train(config, "other", resume=False)
    assert same(other.weights, whole.weights)
    assert other.seconds == 4.0
    assert other.rows == whole.rows  # and none of before


def test_what_starts_again_never_goes_on_from_before(watch, tiny, toys):
    """Also where it dies before its first checkpoint: the next call begins, too, and its history has every step."""
    with pytest.raises(Crash):
        watch.train(tiny, crash_at=7)
    with pytest.raises(Crash):
        watch.train(tiny, resume=False, crash_at=2, checkpoint_seconds=math.inf)
    assert not (watch.folder / "run" / "checkpoint.pt").exists()
    again = watch.train(tiny)
    assert len(again.steps) == 12
    assert [row["step"] for row in again.rows] == list(range(1, 13))


def test_a_checkpoint_is_due_after_its_interval_and_writing_takes_2_percent_at_most(watch, tiny, toys, monkeypatch):
    """Writing takes 0.07 seconds here, so that every 2 seconds become every 3.5 after the first."""
    written, save = [], loop.save

    def slow(path, state, step, seconds):
        save(path, state, step, seconds)
        watch.clock += 0.07
        written.append((step, seconds))

    monkeypatch.setattr(loop, "save", slow)
    watch.train(tiny, checkpoint_seconds=2.0)
    assert [step for step, _ in written] == [3, 7, 11]
    assert [seconds for _, seconds in written] == pytest.approx([3, 7.07, 11.14])
    written.clear()
    watch.train(tiny, "quick", checkpoint_seconds=4.0)
    assert [step for step, _ in written] == [5, 10]


def test_a_damaged_checkpoint_starts_again_and_anothers_is_refused(watch, tiny, capsys):
    """What is not as it was written is of no use to anybody; another run's may be, and stays."""
    (watch.folder / "run").mkdir()
    path = watch.folder / "run/checkpoint.pt"
    expected = watch.train(tiny).tokenizer.state_dict()
    for content in (b"not a checkpoint", b""):
        path.write_bytes(content)
        assert same(watch.train(tiny).tokenizer.state_dict(), expected)
        assert f"{path} is damaged: File is not a zip file; training starts again" in capsys.readouterr().err
    watch.train(replace(tiny, width=24), resume=False)
    with pytest.raises(UserError, match="no checkpoint of this run; delete it or pass --no-resume"):
        watch.train(tiny)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="is a folder and no checkpoint; move it away, and the same command"):
        watch.train(tiny)
    with pytest.raises(IsADirectoryError, match=str(path)):  # which commands tell with the same fix
        watch.train(tiny, resume=False)


def test_a_pipe_where_a_checkpoint_belongs_is_not_waited_for(watch, tiny, impatient, capsys):
    """Training starts again, of which a line tells."""
    (watch.folder / "run").mkdir()
    path = watch.folder / "run/checkpoint.pt"
    os.mkfifo(path)
    trained = watch.train(tiny)
    assert f"{path} is damaged: it is not a file; training starts again" in capsys.readouterr().err
    assert same(trained.weights, watch.train(tiny, "other").weights)


def test_nothing_in_a_checkpoint_is_executed(watch, tiny):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(watch.folder / "executed"),)

    path = watch.folder / "run/checkpoint.pt"
    path.parent.mkdir()
    torch.save({"tokenizer": Evil()}, path)
    with pytest.raises(UserError, match="no checkpoint of this run"):
        watch.train(tiny)
    path.write_bytes(pickle.dumps({"tokenizer": Evil()}))
    watch.train(tiny)
    assert not (watch.folder / "executed").exists()


def during(toys, step, act):
    """Has ``act`` called in that step of the next Toy."""
    forward = Toy.forward

    class Acting(Toy):
        def forward(self, x, parts=1):
            if len(self.seen) == step:
                act()
            return forward(self, x, parts)

    return lambda config: toys.append(Acting(config)) or toys[-1]


def test_a_row_can_be_read_as_soon_as_it_is_logged(watch, tiny, toys, monkeypatch):
    """By whoever looks at the run meanwhile; and what is killed has lost none."""
    read = []
    monkeypatch.setattr(module, "Tokenizer", during(toys, 5, lambda: read.extend(rows(watch.folder / "run"))))
    watch.train(tiny)
    assert [row["step"] for row in read] == [1, 2, 3, 4, 5]


def test_a_terminal_that_is_gone_stops_too_unless_that_is_ignored():
    """As nohup has it. Nothing is left of the handlers."""
    before = signal.getsignal(signal.SIGHUP)
    with loop.interruptible() as event:
        os.kill(os.getpid(), signal.SIGHUP)
        assert event.is_set()
    assert signal.getsignal(signal.SIGHUP) == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with loop.interruptible() as event:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not event.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_the_same_call_goes_on(watch, tiny, toys, monkeypatch, number):
    whole = watch.train(tiny, "whole")
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(module, "Tokenizer", during(toys, 5, lambda: os.kill(os.getpid(), number)))
        with pytest.raises(Interrupted, match="step 6 of 12"):
            watch.train(tiny, "parts", checkpoint_seconds=math.inf)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert checkpoint(watch.folder / "parts")["at"] == (6, 6.0)
    parts = watch.train(tiny, "parts")
    assert same(parts.weights, whole.weights)
    assert len(parts.steps) == 6


def test_a_second_signal_stops_at_once(watch, tiny, toys, monkeypatch):
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(module, "Tokenizer", during(toys, 5, twice))
    with pytest.raises(KeyboardInterrupt):
        watch.train(tiny)
    assert checkpoint(watch.folder / "run")["at"] == (5, 5.0)


def test_other_threads_train_too(watch, tiny, toys):
    """Signal handlers can be set by the main thread only."""
    done = []
    thread = threading.Thread(target=lambda: done.append(watch.train(tiny)))
    thread.start()
    thread.join()
    assert len(done[0].rows) == 12


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["decoder.last_layer", "pull"])
def test_divergence_stops_the_run_and_is_never_saved(watch, tiny, toys, monkeypatch, part, value):
    """Of the pixel loss and its gradients, or of the quantizer's loss alone, whose gradient stays 1."""

    def spoil():
        with torch.no_grad():
            toys[-1].get_parameter(part).fill_(value)

    monkeypatch.setattr(module, "Tokenizer", during(toys, 5, spoil))
    with pytest.raises(Diverged, match=r"not finite by step 6; try --lr below 0\.002$"):
        watch.train(tiny)
    assert [row["step"] for row in rows(watch.folder / "run")] == [1, 2, 3, 4, 5]
    assert checkpoint(watch.folder / "run")["at"] == (5, 5.0)
    assert all(value.isfinite().all() for _, value in tensors(checkpoint(watch.folder / "run")))


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_autocast_is_to_bfloat16_on_every_device(device):
    """torch's own choice for CUDA is float16, which would need its losses scaled."""
    context = loop.autocast(SimpleNamespace(device=device, precision="bf16"))
    assert (context.device, context.fast_dtype) == (device.partition(":")[0], torch.bfloat16)


def test_every_step_has_random_draws_of_its_own(watch, tiny, toys):
    """Which depend on nothing but (seed, step)."""
    for seed in (0, 1):
        watch.train(replace(tiny, seed=seed), f"{seed}")
    seeds = [seed for toy in toys for *_, seed in toy.seen]
    assert len(set(seeds)) == 24
    assert seeds == [step_seed(seed, step) for seed in (0, 1) for step in range(12)]
    codes = [quantized.codes for _, _, quantized, _ in toys[0].seen]
    assert not any(torch.equal(codes[0], other) for other in codes[1:])


def test_step_seeds_never_meet():
    """Neither for neighbours nor at the ends of the ranges; torch takes them all."""
    seeds, steps = (0, 1, 2, 2**31 - 1), (0, 1, 2, 699, 2**16, 2**31, 2**32 - 1)
    found = [step_seed(seed, step) for seed in seeds for step in steps]
    assert len(set(found)) == len(found)
    assert max(found) < 2**63


def test_no_two_seeds_share_the_draws_of_a_step():
    """On the CPU too, whose generator forgets all but 32 bits of what it is given."""
    places = [(seed, step) for seed in range(20) for step in range(100)]
    draws = [torch.rand(2, generator=torch.Generator().manual_seed(step_seed(*place))) for place in places]
    assert len({tuple(pair.tolist()) for pair in draws}) == len(places)


def test_the_applied_rate_warms_up_and_follows_the_cosine(watch, tiny, toys):
    config = replace(tiny, lr=0.01, warmup=4)
    trained = watch.train(config)
    expected = [0.01 * min(1, (k + 1) / 4) * 0.5 * (1 + math.cos(math.pi * k / 12)) for k in range(12)]
    assert [step.rates for step in trained.steps] == [pytest.approx([rate] * 2) for rate in expected]
    assert [row["lr"] for row in trained.rows] == pytest.approx(expected)


def test_learning_rate_warms_up_and_ends_near_zero(tiny):
    config = replace(tiny, lr=1.0, warmup=10, steps=100)
    rates = [learning_rate(config, step) for step in range(100)]
    cosine = [0.5 * (1 + math.cos(math.pi * step / 100)) for step in range(100)]
    assert [rate / share for rate, share in zip(rates[:10], cosine, strict=False)] == pytest.approx(
        [n / 10 for n in range(1, 11)]
    )
    assert rates[9:] == pytest.approx(cosine[9:])
    assert 0 < rates[-1] < 1e-3
    assert learning_rate(replace(config, warmup=0), 0) == learning_rate(replace(config, warmup=1), 0) == 1.0
    assert learning_rate(replace(config, lr=0.3), 50) == pytest.approx(0.15)  # half way, half the peak


def test_an_update_is_adamw_s(watch, tiny, toys):
    """With betas 0.9 and 0.95, and the decay of either group, from the recorded gradients by the paper's formulas."""
    config = replace(tiny, lr=0.01, weight_decay=0.5, grad_clip=0.1)
    steps = watch.train(config).steps
    assert {tuple(step.decays) for step in steps} == {(0.5, 0.0)}
    for step, expected in zip(steps, adamw(steps, (0.9, 0.95)), strict=True):
        for after, weight in zip(step.after, expected, strict=True):
            torch.testing.assert_close(after.double(), weight, rtol=1e-4, atol=1e-6)


def test_only_the_average_s_weights_are_returned(watch, tiny):
    """In eval mode and frozen: parameters averaged after every step, buffers (codes that are moving averages of their
    own) the last."""
    config = replace(tiny, weight_ema=0.3)  # below (1 + n) / (10 + n) from the third step on
    trained = watch.train(config)
    means = [torch.zeros_like(tensor) for tensor in trained.steps[0].after]
    for n, step in enumerate(trained.steps):
        decay = min(0.3, (1 + n) / (10 + n)) if n else 0.0
        means = [decay * mean + (1 - decay) * after for mean, after in zip(means, step.after, strict=True)]
    groups = parameter_groups(trained.tokenizer, 0.0)
    found = [parameter for group in groups for parameter in group["params"]]
    for parameter, mean in zip(found, means, strict=True):
        torch.testing.assert_close(parameter, mean, rtol=1e-4, atol=1e-7)
    live = checkpoint(trained.folder)["tokenizer"]
    for name, buffer in trained.tokenizer.named_buffers():
        assert torch.equal(buffer, live[name]), name
    assert not any(part.training for part in trained.tokenizer.modules())
    assert not any(parameter.requires_grad for parameter in trained.tokenizer.parameters())


def test_weight_ema_0_returns_the_last_weights(watch, tiny):
    trained = watch.train(replace(tiny, weight_ema=0.0))
    assert same(trained.weights, checkpoint(trained.folder)["tokenizer"])
    last = [parameter for group in parameter_groups(trained.tokenizer, 0.0) for parameter in group["params"]]
    assert all(torch.equal(a, b) for a, b in zip(last, trained.steps[-1].after, strict=True))


def test_weight_average_is_the_formula():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average, expected = loop.averaged(model, 0.9), 0.0
    for n in range(100):
        with torch.no_grad():
            model.weight.fill_(n)
        average.update_parameters(model)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = n if n == 0 else decay * expected + (1 - decay) * n
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-4)


advance = loop.Bar.advance


def test_a_term_s_mean_is_over_the_steps_that_had_it():
    window = Window()
    window.add({"reconstruction": torch.tensor(2.0, requires_grad=True)})
    window.add({"reconstruction": torch.tensor(4.0), "gan": torch.tensor(5.0)})
    assert window.means() == {"reconstruction": 3.0, "gan": 5.0}


@pytest.mark.parametrize(("steps", "interval"), [(9, 1), (399, 1), (400, 2), (1000, 5), (40_000, 50)])
def test_about_200_rows_are_logged(watch, tiny, toys, steps, interval):
    """But never fewer than one every 50 steps."""
    with pytest.raises(Crash):
        watch.train(replace(tiny, steps=steps, batch_size=1), crash_at=min(steps - 1, 2 * interval))
    found = [row["step"] for row in rows(watch.folder / "run")]
    assert found[:2] == [interval, 2 * interval]


def test_the_last_step_is_logged_always(watch, tiny, toys):
    """A run of 401 steps logs every second."""
    with pytest.raises(Crash):
        watch.train(replace(tiny, steps=401, batch_size=1), crash_at=2)
    forward = torch.load(watch.folder / "run/checkpoint.pt", weights_only=True)
    forward["at"] = (398, 2.0)
    torch.save(forward, watch.folder / "run/checkpoint.pt")
    trained = watch.train(replace(tiny, steps=401, batch_size=1))
    assert [row["step"] for row in trained.rows] == [2, 400, 401]
    assert checkpoint(trained.folder)["at"] == (401, 5.0)


def test_the_bar_counts_every_step_and_names_the_run(watch, tiny, toys, monkeypatch):
    """From where the run goes on, at the speed of this part alone: a step of 8 images a second."""
    bars = []

    class Bar(loop.Bar):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.figures = []
            bars.append(self)

        def advance(self, count=1, figures=""):
            self.figures.append(figures)
            super().advance(count, figures)

    monkeypatch.setattr(loop, "Bar", Bar)
    with pytest.raises(Crash):
        watch.train(tiny, crash_at=5)
    watch.train(tiny)
    first, second = bars
    assert (first.label, first.start, first.done, first.total) == ("cnn ema seed 0", 0, 5, 12)
    assert (second.start, second.done, second.total) == (5, 12, 12)
    assert len(second.figures) == 7
    assert all(figures.endswith("  8 images/s") for figures in first.figures + second.figures)


def test_the_bar_counts_steps_not_rows(watch, tiny, toys, monkeypatch):
    """A run of 400 steps logs every second."""
    moved = []
    monkeypatch.setattr(loop.Bar, "advance", lambda self, count, figures: moved.append(count) or advance(self, count))
    with pytest.raises(Crash):
        watch.train(replace(tiny, steps=400, batch_size=1), crash_at=7)
    assert moved == [2, 2, 2]


def test_what_a_layer_marks_does_not_decay():
    """A matrix, too."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    model[1].weight._no_weight_decay = True
    decayed, free = (group["params"] for group in parameter_groups(model, 0.1))
    assert [tuple(parameter.shape) for parameter in decayed] == [(3, 2)]
    assert [tuple(parameter.shape) for parameter in free] == [(3,), (4, 3), (4,)]


def test_a_checkpoint_and_a_history_are_replaced_as_a_whole(tmp_path, monkeypatch):
    """A disk that fills up leaves what was there, which the run can go on from."""
    path, history = tmp_path / "checkpoint.pt", tmp_path / "history.jsonl"
    loop.save(path, {"model": nn.Linear(2, 2)}, 3, 1.5)
    history.write_text('{"step": 1}\n{"step": 2}\n')
    before = {file: file.read_bytes() for file in (path, history)}

    def fail(content, file) -> None:
        with open(file, "wb") as half:
            half.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(loop.torch, "save", fail)
    monkeypatch.setattr(type(path), "write_text", lambda file, text: fail(text, file))
    with pytest.raises(OSError, match="disk full"):
        loop.save(path, {"model": nn.Linear(2, 2)}, 4, 2.5)
    with pytest.raises(OSError, match="disk full"):
        rewind(history, 1)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_checkpoint_is_read_onto_the_device_of_the_run(tmp_path, monkeypatch):
    """Whichever it was written on; each part gets its own state, and the file is named if it has none."""
    path, asked, config = tmp_path / "checkpoint.pt", [], make_config("cnn", "smoke", device="cuda:1", steps=9)
    model, load = nn.Linear(2, 1, bias=False), torch.load
    torch.save({"model": {"weight": torch.ones(1, 2)}, "at": (3, 1.5)}, path)
    monkeypatch.setattr(loop.torch, "load", lambda *given, **options: asked.append((given, options)) or load(path))
    assert loop.restore(path, {"model": model}, config) == (3, 1.5)
    assert asked == [((path,), {"map_location": "cuda:1", "weights_only": True})]
    assert model.weight.tolist() == [[1, 1]]
    for parts in ({"model": nn.Linear(2, 1)}, {"model": model, "ema": model}, {"optimizer": loop.adamw(model, 0.1)}):
        with pytest.raises(UserError) as error:
            loop.restore(path, parts, config)
        assert str(error.value).startswith(f"{path} is no checkpoint of this run; delete it or pass --no-resume")


@pytest.mark.parametrize("at", [(0, 1.0), (10, 1.0), (-1, 1.0), ("3", 1.0), (3,), 3, None, (3, "x")])
def test_a_checkpoint_of_a_step_that_the_run_has_not_is_refused(tmp_path, at):
    path, model = tmp_path / "checkpoint.pt", nn.Linear(2, 1)
    torch.save({"model": model.state_dict(), "at": at}, path)
    with pytest.raises(UserError, match="is no checkpoint of this run"):
        loop.restore(path, {"model": model}, make_config("cnn", "smoke", device="cpu", steps=9))


@pytest.mark.parametrize("content", [[1], 3, {}, {"model": [1], "at": (1, 1.0)}, {"model": None, "at": (1, 1.0)}])
def test_a_checkpoint_that_holds_something_else_is_refused(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    with pytest.raises(UserError, match="is no checkpoint of this run"):
        loop.resumed(path, {"model": nn.Linear(2, 1)}, make_config("cnn", "smoke", device="cpu"))


def test_any_flipped_bit_of_a_checkpoint_is_noticed(tmp_path, capsys):
    """Training starts again, loudly, rather than going on to another result; a flip that changes nothing may pass."""
    path, config, model = tmp_path / "checkpoint.pt", make_config("cnn", "smoke", device="cpu"), nn.Linear(3, 2)
    loop.save(path, {"model": model}, 7, 1.5)
    whole, state = path.read_bytes(), {name: value.clone() for name, value in model.state_dict().items()}
    noticed = 0
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        fresh = nn.Linear(3, 2)
        try:
            found = loop.resumed(path, {"model": fresh}, config)
        except UserError:
            found = (0, 0.0)
        noticed += found == (0, 0.0)
        if found != (0, 0.0):
            assert found == (7, 1.5)
            assert all(fresh.state_dict()[name].equal(value) for name, value in state.items())
    assert noticed > 0
    said = capsys.readouterr().err.splitlines()
    assert said
    assert all(line.startswith(f"{path} is damaged: ") and line.endswith("; training starts again") for line in said)


@pytest.mark.parametrize("size", [0, 10, -200, -1])
def test_a_checkpoint_that_is_cut_off_starts_training_again(tmp_path, size):
    path, config = tmp_path / "checkpoint.pt", make_config("cnn", "smoke", device="cpu")
    assert loop.resumed(path, {}, config) == (0, 0.0)  # without any
    loop.save(path, {"model": nn.Linear(3, 2)}, 7, 1.5)
    path.write_bytes(path.read_bytes()[:size])
    assert loop.resumed(path, {"model": nn.Linear(3, 2)}, config) == (0, 0.0)


def test_a_stopped_run_says_how_it_goes_on_and_its_history_has_milliseconds(watch, tiny, toys, monkeypatch):
    def stop():
        watch.clock += 0.123456
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module, "Tokenizer", during(toys, 2, stop))
    with pytest.raises(Interrupted) as error:
        watch.train(tiny)
    assert str(error.value) == "stopped at step 3 of 12; the same command continues from there"
    assert [row["seconds"] for row in rows(watch.folder / "run")] == [1, 2, 3.123]


def test_other_threads_leave_signals_to_the_main_one():
    """Which alone may say what they do; and a second SIGTERM, of one who tells all processes of a job, says no more."""
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with loop.interruptible() as event:
            seen.extend([signal.getsignal(signal.SIGTERM), event.is_set()])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, False]
    with loop.interruptible() as event:
        os.kill(os.getpid(), signal.SIGTERM)
        assert event.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_that_an_older_version_stopped_goes_on(watch, tiny, toys):
    """Its checkpoint calls the averaged weights by another name."""
    whole = watch.train(tiny, "whole")
    with pytest.raises(Crash):
        watch.train(tiny, crash_at=5)
    stored = checkpoint(watch.folder / "run")
    torch.save(
        {{"ema": "average"}.get(name, name): part for name, part in stored.items()}, watch.folder / "run/checkpoint.pt"
    )
    assert same(watch.train(tiny).weights, whole.weights)
