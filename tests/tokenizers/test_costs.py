"""What a tokenizer costs: counted and timed on toys, with a clock that says what the test wants."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from bench.core import environment
from bench.core.environment import peak_memory
from bench.tokenizers import costs
from bench.tokenizers.costs import static_costs, throughput


class Toy(nn.Module):
    """One code per pixel. Encoding and decoding take as long as the test says, one number for each call."""

    config = SimpleNamespace(image_size=4, grid_size=4, code_dim=2)

    def __init__(self, encode=(), decode=()):
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.register_buffer("codebook", torch.zeros(5, 2))
        self.seconds = {"encode": list(encode), "decode": list(decode)}
        self.now, self.calls = 100.0, []

    def work(self, side, given):
        self.now += self.seconds[side].pop(0)
        self.calls.append((side, given))

    def encode(self, x):
        if self.calls:  # the first call only makes the codes to decode
            self.work("encode", x)
        self.calls += [] if self.calls else [("codes", x)]
        return torch.ones(len(x), 4, 4, dtype=torch.int64)

    def decode(self, codes):
        self.work("decode", codes)


@pytest.fixture
def timed(monkeypatch):
    """Throughput of a toy, and the calls that it took."""

    def timed(encode, decode):
        toy = Toy(encode, decode)
        monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: toy.now))
        return throughput(toy, 4, "cpu"), toy.calls

    return timed


def test_throughput_is_the_best_of_three_after_a_warm_up(timed):
    """The first call does not count, even where it is the quickest; encoding and decoding are told apart."""
    found, calls = timed([0.125, 4, 0.5, 2], [3, 1, 2, 0.25])
    assert found == {"images_per_second_encode": 128, "images_per_second_decode": 256}
    assert [side for side, _ in calls] == ["codes", *["encode"] * 4, *["decode"] * 4]


def test_throughput_times_batches_of_64_images_and_their_codes(timed):
    _, calls = timed([1] * 4, [1] * 4)
    shapes = {"codes": (64, 3, 4, 4), "encode": (64, 3, 4, 4), "decode": (64, 4, 4)}
    for side, given in calls:
        assert given.shape == shapes[side]
        assert not given.requires_grad
    assert -1 <= calls[0][1].min() < -0.9 < 0.9 < calls[0][1].max() <= 1  # not zeros, which some code may skip


def test_throughput_gives_up_after_ten_seconds(timed):
    """Where the first call takes as long, it is all there is to count."""
    found, calls = timed([16], [4, 8])
    assert found == {"images_per_second_encode": 4, "images_per_second_decode": 8}
    assert [side for side, _ in calls] == ["codes", "encode", "decode", "decode"]


@pytest.mark.parametrize(("device", "seconds"), [("cuda", 5), ("cuda:1", 5), ("cpu", 1)])
def test_work_on_a_gpu_is_timed_until_the_gpu_has_done_it(monkeypatch, device, seconds):
    """The call returns after a second; a GPU is busy for four more, which only a synchronisation waits for."""
    now, waited = [0.0], []

    def work():
        now[0] += 1

    def synchronize(device):
        now[0] += 4
        waited.append(device)

    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(costs, "THROUGHPUT_SECONDS", 100)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert costs._best_seconds(work, torch.device(device)) == seconds
    assert waited == ([torch.device(device)] * 4 if device != "cpu" else [])


def test_each_side_is_counted_by_itself():
    """Weights: of the encoder 3·2, of the decoder 2·3·9; at 4×4 pixels each takes a multiplication and an addition.
    What the codebook holds is neither's."""
    found = static_costs(Toy())
    assert (found["params_encoder"], found["params_decoder"]) == (6, 54)
    assert (found["flops_encode"], found["flops_decode"]) == (2 * 16 * 6, 2 * 16 * 54)


def test_peak_memory_on_a_gpu_is_what_torch_allocated_since_the_start(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append(("reset", device)))
    monkeypatch.setattr(
        torch.cuda, "max_memory_allocated", lambda device: asked.append(("read", device)) or 3 * 2**20 + 2**19
    )
    with peak_memory("cuda:1") as peak:
        assert asked == [("reset", "cuda:1")]
        assert peak() == 3.5
    assert asked[1:] == [("read", "cuda:1")]


def test_peak_memory_grows_with_what_is_held_and_forgets_what_was_before():
    """64 MB that have been written to and freed again are in the peak of that context, and not in that of the next."""
    with peak_memory("cpu") as peak:
        before = peak()
        if before is None:
            pytest.skip("this system cannot reset it")
        block = np.ones(2**23)
        assert block.sum() == 2**23
        del block
        during = peak()
    with peak_memory("cpu") as peak:
        after = peak()
    assert 60 < during - before < 90  # MB of 2²⁰ bytes
    assert after < before + 30


def test_peak_memory_is_missing_where_it_cannot_be_reset(monkeypatch):
    """A number that carries over from run to run would be worse than none."""
    monkeypatch.setattr(environment, "_reset_peak_resident", lambda: False)
    with peak_memory("cpu") as peak:
        assert peak() is None
