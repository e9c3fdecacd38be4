"""The SSD scan and the Mamba-2 layer, held against their definitions written out here one step at a time."""

from __future__ import annotations

import functools
import inspect
import math
import sys
import types
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from backbones.mamba import BidirectionalMambaBlock
from backbones.ssd import Mamba2, RMSNormGated, fast_scan, scan_backend, ssd_scan, ssd_step
from tests.triton_interpreter import InTwoPieces, fast_path, slow_path

BATCH, HEADS, HEAD_DIM, STATE_DIM = 2, 4, 3, 5


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


def recurrence(x, dt, A, B, C, D, initial_state) -> tuple[Tensor, Tensor]:
    """The definition: S_t = exp(Δ_t A) S_{t-1} + Δ_t x_t ⊗ B_t and y_t = S_t C_t + D x_t, for every head."""
    B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], dim=2) for t in (B, C))
    state, outputs = initial_state, []
    for t in range(x.shape[1]):
        written = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + written
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]) + D[:, None] * x[:, t])
    return torch.stack(outputs, 1), state


def scan_inputs(length: int, groups: int = 1, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random arguments of `ssd_scan`, an initial state included, that require gradients."""
    torch.manual_seed(length + groups)
    tensors = {
        "x": torch.randn(BATCH, length, HEADS, HEAD_DIM),
        "dt": F.softplus(torch.randn(BATCH, length, HEADS) - 1),
        "A": -torch.randn(HEADS).exp(),
        "B": torch.randn(BATCH, length, groups, STATE_DIM),
        "C": torch.randn(BATCH, length, groups, STATE_DIM),
        "D": torch.randn(HEADS),
        "initial_state": torch.randn(BATCH, HEADS, HEAD_DIM, STATE_DIM),
    }
    return {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}


def without_initial_state(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in inputs.items() if name != "initial_state"}


def gradients(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of a fixed random projection, so that no two errors cancel."""
    g = torch.Generator().manual_seed(0)
    loss = sum((out * torch.randn(out.shape, generator=g).to(out)).sum() for out in outputs)
    return torch.autograd.grad(loss, inputs)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], **tolerance: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **tolerance)


# --- the scan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("chunk_size", [1, 16, 64])
@pytest.mark.parametrize("length", [1, 5, 64, 130])
def test_scan_is_the_recurrence_and_so_are_its_gradients(length: int, chunk_size: int, groups: int):
    inputs = scan_inputs(length, groups)
    expected = recurrence(**inputs)
    actual = ssd_scan(**inputs, chunk_size=chunk_size, return_final_state=True)
    assert_same(actual, expected)
    leaves = tuple(inputs.values())
    assert_same(gradients(actual, leaves), gradients(expected, leaves))


@pytest.mark.parametrize("length", [1, 5, 130])
def test_no_initial_state_is_zero_and_no_skip_is_zero(length: int):
    inputs = scan_inputs(length)
    zeros = dict(inputs, initial_state=torch.zeros_like(inputs["initial_state"]), D=torch.zeros_like(inputs["D"]))
    expected, _ = recurrence(**zeros)
    torch.testing.assert_close(ssd_scan(**dict(without_initial_state(inputs), D=None)), expected)


def test_float32_is_close_to_float64():
    inputs = scan_inputs(130, dtype=torch.float32)
    expected, _ = recurrence(**{name: t.double() for name, t in inputs.items()})
    actual = ssd_scan(**inputs)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 40), chunk_sizes=st.tuples(st.integers(1, 48), st.integers(1, 48)))
def test_chunk_size_does_not_change_the_result(length: int, chunk_sizes: tuple[int, int]):
    inputs = scan_inputs(length, groups=2)
    first, second = (ssd_scan(**inputs, chunk_size=size, return_final_state=True) for size in chunk_sizes)
    assert_same(first, second)


@settings(max_examples=30, deadline=None)
@given(length=st.integers(2, 40), data=st.data())
def test_two_halves_joined_by_their_state_are_the_whole(length: int, data: st.DataObject):
    cut = data.draw(st.integers(1, length - 1), label="cut")
    inputs = scan_inputs(length)
    whole = ssd_scan(**inputs, chunk_size=8, return_final_state=True)
    early, late = dict(inputs), dict(inputs)
    for name in ("x", "dt", "B", "C"):
        early[name], late[name] = inputs[name][:, :cut], inputs[name][:, cut:]
    y_early, late["initial_state"] = ssd_scan(**early, chunk_size=8, return_final_state=True)
    y_late, final = ssd_scan(**late, chunk_size=8, return_final_state=True)
    assert_same((torch.cat([y_early, y_late], 1), final), whole)


@pytest.mark.parametrize("t", [0, 7, 8, 19])
def test_scan_does_not_see_the_future(t: int):
    inputs = without_initial_state(scan_inputs(20))
    steps = {name: inputs[name] for name in ("x", "dt", "B", "C")}
    y = ssd_scan(**inputs, chunk_size=8)
    for name, grad in zip(steps, torch.autograd.grad(y[:, t].sum(), tuple(steps.values())), strict=True):
        assert (grad[:, t + 1 :] == 0).all(), name
        assert (grad[:, t] != 0).any(), name
        if name != "C":  # which reads, and so acts on its own step alone
            assert all((grad[:, past] != 0).any() for past in range(t)), name


@pytest.mark.parametrize("steps", ["tiny", "huge", "mixed"])
def test_extreme_step_sizes_stay_finite_and_right(steps: str):
    inputs = scan_inputs(40, dtype=torch.float32)
    dt = {"tiny": [1e-4], "huge": [50.0], "mixed": [1e-4, 50.0]}[steps]
    inputs["dt"] = torch.tensor(dt).repeat(40 // len(dt))[None, :, None].repeat(BATCH, 1, HEADS).requires_grad_()
    inputs["A"] = torch.tensor([-16.0, -4.0, -1.0, -0.1], requires_grad=True)
    leaves = tuple(inputs.values())
    actual, expected = ssd_scan(**inputs, return_final_state=True), recurrence(**inputs)
    assert_same(actual, expected, rtol=1e-3, atol=1e-3)
    assert all(grad.isfinite().all() for grad in gradients(actual, leaves))


def test_one_step_is_a_scan_of_length_one():
    inputs = scan_inputs(1, groups=2)
    once = {name: t[:, 0] if name in ("x", "dt", "B", "C") else t for name, t in inputs.items()}
    y, state = ssd_step(state=once.pop("initial_state"), **once)
    actual, expected = (y.unsqueeze(1), state), recurrence(**inputs)
    assert_same(actual, expected)
    leaves = tuple(inputs.values())
    assert_same(gradients(actual, leaves), gradients(expected, leaves))


def test_one_step_without_skip_is_that_with_a_zero():
    inputs = scan_inputs(1, groups=2)
    once = {name: t[:, 0] if name in ("x", "dt", "B", "C") else t for name, t in inputs.items()}
    once["state"] = once.pop("initial_state")
    assert_same(ssd_step(**{**once, "D": None}), ssd_step(**{**once, "D": torch.zeros(HEADS)}))


def test_one_step_computes_in_float32_under_autocast():
    inputs = scan_inputs(1, dtype=torch.float32)
    once = {name: t[:, 0] if name in ("x", "dt", "B", "C") else t for name, t in inputs.items()}
    once["state"] = once.pop("initial_state")
    low = dict(once, **{name: once[name].bfloat16() for name in ("x", "B", "C")})
    for given_inputs in (once, low):
        y, state = ssd_step(**{name: t.float() for name, t in given_inputs.items()})
        with torch.autocast("cpu", torch.bfloat16):
            found, found_state = ssd_step(**given_inputs)
        assert found.dtype == given_inputs["x"].dtype
        assert found_state.dtype == torch.float32
        assert torch.equal(found, y.to(found.dtype))
        assert torch.equal(found_state, state)


def test_a_state_is_given_back_only_if_asked_for():
    inputs = scan_inputs(20)
    y, state = ssd_scan(**inputs, return_final_state=True)
    assert torch.equal(ssd_scan(**inputs), y)
    assert state.shape == (BATCH, HEADS, HEAD_DIM, STATE_DIM)


def test_every_head_and_sequence_stands_alone():
    """Its own Δ, A, D and x; B and C are those of its group, neighbouring heads together."""
    inputs = scan_inputs(9, groups=2)
    y, state = ssd_scan(**inputs, chunk_size=4, return_final_state=True)
    for b in range(BATCH):
        for head in range(HEADS):
            alone = {name: t[b : b + 1, :, head : head + 1] for name, t in inputs.items() if name in ("x", "dt")}
            alone |= {name: inputs[name][head : head + 1] for name in ("A", "D")}
            group = head // (HEADS // 2)
            alone |= {name: inputs[name][b : b + 1, :, group : group + 1] for name in ("B", "C")}
            found = ssd_scan(
                **alone, initial_state=inputs["initial_state"][b : b + 1, head : head + 1], return_final_state=True
            )
            expected = (y[b : b + 1, :, head : head + 1], state[b : b + 1, head : head + 1])
            assert_same(found, expected)


def test_chunks_are_even_and_no_longer_than_asked_for(monkeypatch: pytest.MonkeyPatch):
    """The quadratic part is paid per chunk: 130 steps are 44 + 44 + 42."""
    lengths = []
    attend = sys.modules["backbones.ssd"]._attend
    monkeypatch.setattr("backbones.ssd._attend", lambda dx, *a: lengths.append(dx.shape[1]) or attend(dx, *a))
    ssd_scan(**scan_inputs(130), chunk_size=64)
    assert lengths == [44, 44, 42]


def test_scan_computes_in_float32_under_autocast():
    inputs = scan_inputs(20, dtype=torch.float32)
    low = dict(inputs, **{name: inputs[name].bfloat16() for name in ("x", "B", "C")})
    for given_inputs in (inputs, low):
        exact = {name: t.float() for name, t in given_inputs.items()}
        expected, expected_state = ssd_scan(**exact, return_final_state=True)
        with torch.autocast("cpu", torch.bfloat16):
            y, state = ssd_scan(**given_inputs, return_final_state=True)
        assert y.dtype == given_inputs["x"].dtype
        assert state.dtype == torch.float32
        assert torch.equal(y, expected.to(y.dtype))
        assert torch.equal(state, expected_state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": torch.zeros(BATCH, 6, 3, STATE_DIM), "C": torch.zeros(BATCH, 6, 3, STATE_DIM)}, "groups must divide"),
        ({"C": torch.zeros(BATCH, 6, 2, STATE_DIM)}, "C must have shape"),
        ({"dt": torch.ones(BATCH, 6, 1)}, "dt must have shape"),
        ({"A": -torch.ones(1)}, "A must have shape"),
        ({"D": torch.ones(HEADS, HEAD_DIM)}, "D must have shape"),
        ({"initial_state": torch.zeros(BATCH, HEADS, STATE_DIM, HEAD_DIM)}, "state must have shape"),
        ({"x": torch.zeros(BATCH, 0, HEADS, HEAD_DIM)}, "l >= 1"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ssd_scan(**{**scan_inputs(6), **change})


# --- the layer ------------------------------------------------------------------------------------------------------


def small_layer(**changes) -> Mamba2:
    torch.manual_seed(0)
    layer = Mamba2(**{"d_model": 12, "d_state": 5, "headdim": 4, "ngroups": 2, "chunk_size": 8, **changes})
    for parameter in (layer.D, layer.norm.weight):  # ones at first, which would hide their misuse
        torch.nn.init.normal_(parameter)
    return layer


def layer_by_definition(m: Mamba2, u: Tensor) -> Tensor:
    """The Mamba-2 layer in the plainest operations there are."""
    bc = m.ngroups * m.d_state
    z, x, B, C, dt = m.in_proj(u).split([m.d_inner, m.d_inner, bc, bc, m.nheads], dim=-1)
    conv = m.conv1d(torch.cat([x, B, C], -1).transpose(1, 2))[..., : u.shape[1]].transpose(1, 2)
    x, B, C = F.silu(conv).split([m.d_inner, bc, bc], dim=-1)
    x = x.unflatten(-1, (m.nheads, m.headdim))
    B, C = B.unflatten(-1, (m.ngroups, -1)), C.unflatten(-1, (m.ngroups, -1))
    zero = x.new_zeros(len(u), m.nheads, m.headdim, m.d_state)
    y, _ = recurrence(x, F.softplus(dt + m.dt_bias), -m.A_log.exp(), B, C, m.D, zero)
    gated = (y.flatten(2) * F.silu(z)).unflatten(-1, (m.ngroups, -1))
    normed = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return m.out_proj(normed.flatten(2) * m.norm.weight)


@pytest.mark.parametrize(
    "changes", [{}, {"ngroups": 1, "bias": True}, {"conv_bias": False, "d_conv": 2}, {"d_conv": 1}], ids=str
)
@pytest.mark.parametrize("length", [1, 3, 20])
def test_layer_is_its_definition_and_so_are_its_gradients(length: int, changes: dict):
    m = small_layer(**changes).double()
    u = torch.randn(BATCH, length, 12, dtype=torch.float64, requires_grad=True)
    leaves = (u, *m.parameters())
    actual, expected = m(u), layer_by_definition(m, u)
    torch.testing.assert_close(actual, expected)
    assert_same(gradients((actual,), leaves), gradients((expected,), leaves))


@pytest.mark.parametrize("groups", [1, 3])
def test_gated_norm_is_rms_norm_of_the_gated_channels_group_by_group(groups: int):
    """The gate comes before the norm, and small signals are damped by ε = 1e-5."""
    norm = RMSNormGated(12, groups).double()
    torch.nn.init.normal_(norm.weight)
    y, z = torch.randn(2, 5, 12).double(), torch.randn(2, 5, 12).double()
    for scale in (1.0, 1e-3):
        gated = (scale * y * z / (1 + (-z).exp())).unflatten(-1, (groups, -1))
        expected = (gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * norm.weight
        torch.testing.assert_close(norm(scale * y, z), expected)


def test_defaults_are_those_of_mamba_2():
    """As mamba-ssm has them (test_mamba_ssm asks itself)."""
    defaults = {p.name: p.default for p in inspect.signature(Mamba2).parameters.values() if p.name != "d_model"}
    assert defaults == {
        **{"d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1},
        **{"chunk_size": 256, "bias": False, "conv_bias": True},
    }


def test_decay_rates_start_uniform_and_step_sizes_log_uniform():
    """Over their ranges: a quarter of 2048 heads in each quarter."""
    torch.manual_seed(0)
    layer = Mamba2(8, d_state=4, headdim=1, expand=256)
    shares = (layer.A_log.exp() - 1) / 15, (F.softplus(layer.dt_bias).log() - math.log(1e-3)) / math.log(100)
    for share in shares:
        counts = share.detach().mul(4).floor().long().bincount(minlength=4) / 2048
        torch.testing.assert_close(counts, torch.full((4,), 0.25), atol=0.05, rtol=0)


def test_parameters_are_those_of_mamba_ssm():
    # Mamba2(d_model=96, d_state=16, headdim=32, ngroups=2) of mamba-ssm 2.3.2: 192 inner channels, 6 heads.
    expected = {
        "in_proj.weight": (2 * 192 + 2 * 2 * 16 + 6, 96),
        "conv1d.weight": (192 + 2 * 2 * 16, 1, 4),
        "conv1d.bias": (192 + 2 * 2 * 16,),
        "dt_bias": (6,),
        "A_log": (6,),
        "D": (6,),
        "norm.weight": (192,),
        "out_proj.weight": (96, 192),
    }
    layer = Mamba2(96, d_state=16, headdim=32, ngroups=2)
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == expected
    undecayed = {name for name, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert undecayed == {"dt_bias", "A_log", "D"}


def test_initial_values_lie_in_their_ranges():
    torch.manual_seed(0)
    layer = Mamba2(256, headdim=4)
    dt, A = F.softplus(layer.dt_bias), layer.A_log.exp()
    assert 0.001 - 1e-6 <= dt.min() < 0.0012
    assert 0.08 < dt.max() <= 0.1 + 1e-6
    assert 1 - 1e-5 <= A.min() < 1.5 < 15 < A.max() <= 16 + 1e-5
    assert (layer.D == 1).all()


@pytest.mark.parametrize(
    ("d_model", "headdim", "d_inner"), [(96, 64, 192), (80, 64, 192), (20, 64, 64), (128, 32, 256)]
)
def test_inner_width_is_rounded_up_to_whole_heads(d_model: int, headdim: int, d_inner: int):
    layer = Mamba2(d_model, d_state=4, headdim=headdim)
    assert (layer.d_inner, layer.nheads) == (d_inner, d_inner // headdim)
    assert layer(torch.randn(1, 3, d_model)).shape == (1, 3, d_model)


def test_groups_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(ValueError, match="ngroups=5"):
        Mamba2(64, headdim=32, ngroups=5)


@pytest.mark.parametrize("t", [0, 3, 11, 19])
def test_layer_does_not_see_the_future_nor_other_sequences(t: int):
    layer = small_layer()
    u = torch.randn(BATCH, 20, 12, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(u)[0, t].sum(), u)
    assert (grad[0, t + 1 :] == 0).all()
    assert (grad[0, : t + 1] != 0).any(-1).all()
    assert (grad[1:] == 0).all()


@pytest.mark.parametrize("prompt", [0, 1, 2, 13])
@pytest.mark.parametrize("d_conv", [1, 4])
def test_decoding_step_by_step_is_forward(prompt: int, d_conv: int):
    layer = small_layer(d_conv=d_conv)
    u = torch.randn(BATCH, 20, 12)
    cache = layer.initial_cache(BATCH)
    shapes = [t.shape for t in cache]
    pieces = u.split([prompt] * (prompt > 0) + [1] * (20 - prompt), dim=1)
    outputs = []
    for piece in pieces:
        out, cache = layer.step(piece, cache)
        outputs.append(out)
        assert [t.shape for t in cache] == shapes
    torch.testing.assert_close(torch.cat(outputs, 1), layer(u), rtol=1e-4, atol=1e-5)


def test_a_step_leaves_its_cache_alone():
    layer = small_layer()
    _, cache = layer.step(torch.randn(BATCH, 5, 12), layer.initial_cache(BATCH))
    before = [t.clone() for t in cache]
    u = torch.randn(BATCH, 1, 12)
    first, second = layer.step(u, cache)[0], layer.step(u, cache)[0]
    assert torch.equal(first, second)
    assert_same(tuple(cache), tuple(before), rtol=0, atol=0)


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_cache_holds_the_latest_inputs_of_the_convolution_and_the_scan_s_state(length: int):
    """Written out: the last three of [x, B, C], zeros before the first; and the state of the recurrence."""
    m = small_layer(d_conv=4).double()
    u = torch.randn(BATCH, length, 12, dtype=torch.float64)
    _, cache = m.step(u, m.initial_cache(BATCH))
    _, xBC, dt = m.in_proj(u).split([m.d_inner, m.conv_dim, m.nheads], -1)
    padded = F.pad(xBC, (0, 0, 3, 0))
    torch.testing.assert_close(cache.conv, padded[:, -3:])
    conv = F.silu(m.conv1d(xBC.mT)[..., :length].mT)
    x, B, C = conv.split([m.d_inner, m.ngroups * m.d_state, m.ngroups * m.d_state], -1)
    x, B, C = (t.unflatten(-1, (n, -1)) for t, n in ((x, m.nheads), (B, m.ngroups), (C, m.ngroups)))
    zero = x.new_zeros(BATCH, m.nheads, m.headdim, m.d_state)
    _, state = recurrence(x, F.softplus(dt + m.dt_bias), -m.A_log.exp(), B, C, m.D, zero)
    torch.testing.assert_close(cache.state, state)


def test_an_empty_cache_is_zero_in_float32_or_the_layer_s_float64():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        layer = small_layer().to(dtype)
        cache = layer.initial_cache(3)
        assert cache.conv.shape == (3, layer.d_conv - 1, layer.conv_dim)
        assert cache.state.shape == (3, layer.nheads, layer.headdim, layer.d_state)
        assert {t.dtype for t in cache} == {expected}
        assert not any(t.any() for t in cache)


def test_bf16_autocast_is_close_to_float32_and_keeps_a_float32_state():
    layer = small_layer()
    u = torch.randn(BATCH, 20, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(u)
        out.float().square().sum().backward()  # a backward pass inside autocast is legal as well
        stepped, cache = layer.step(u, layer.initial_cache(BATCH))
    assert out.dtype == torch.bfloat16
    assert {t.dtype for t in cache} == {torch.float32}
    exact = layer(u)
    for rounded in (out, stepped):  # 8 bits at every product: a twentieth leaves room for any machine's order of sums
        assert (rounded.float() - exact).norm() < 0.05 * exact.norm()
    assert all(p.grad.isfinite().all() for p in (u, *layer.parameters()))


def test_layer_runs_on_the_meta_device():
    layer = small_layer().to("meta")
    assert layer(torch.zeros(BATCH, 9, 12, device="meta")).shape == (BATCH, 9, 12)


# --- mamba-ssm's kernel ---------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_fast_scan():
    fast_scan.cache_clear()
    yield
    fast_scan.cache_clear()


@pytest.mark.usefixtures("fresh_fast_scan")
def test_kernel_is_found_only_with_cuda_and_a_working_mamba_ssm(monkeypatch: pytest.MonkeyPatch):
    package, module = types.ModuleType("mamba_ssm"), types.ModuleType("ssd_combined")
    package.__version__, module.mamba_chunk_scan_combined = "2.3.2", print
    monkeypatch.setitem(sys.modules, "mamba_ssm", package)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops", types.ModuleType("ops"))
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton", types.ModuleType("triton"))
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.ssd_combined", module)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fast_scan() is None

    fast_scan.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert fast_scan() is print
    assert scan_backend() == "mamba-ssm 2.3.2 (Triton)"

    fast_scan.cache_clear()
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.ssd_combined", None)  # importing it now fails
    assert fast_scan() is None
    assert scan_backend() == "PyTorch"


class FakeKernel:
    """Takes and gives what mamba-ssm's kernel does, and notes the types; the scan is the recurrence itself."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, dt, A, B, C, chunk_size, D, initial_states, return_final_states):
        self.calls.append({"chunk_size": chunk_size, "types": [t.dtype for t in (x, dt, A, B, C)]})
        state = x.new_zeros(*x.shape[0:1], *x.shape[2:], B.shape[-1]) if initial_states is None else initial_states
        y, state = recurrence(x, dt, A, B, C, D, state)
        return (y, state) if return_final_states else y


@pytest.mark.parametrize("module", [small_layer, lambda: InTwoPieces(small_layer())], ids=["whole", "pieces"])
def test_with_the_kernel_a_layer_is_what_it_is_without(module):
    """Signs, steps, skip and states are handed over as mamba-ssm wants them."""
    kernel, layer, u = FakeKernel(), module(), torch.randn(BATCH, 20, 12)
    with mock.patch("backbones.ssd.fast_scan", return_value=kernel):
        calls, found = fast_path(layer, u, torch.float32)
    expected = slow_path(layer, u, torch.float32)
    assert calls == len(kernel.calls) == (2 if isinstance(layer, InTwoPieces) else 1)
    assert {call["chunk_size"] for call in kernel.calls} == {8}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_the_kernel_gets_autocast_s_type_for_products_and_float32_for_steps():
    kernel, u = FakeKernel(), torch.randn(BATCH, 20, 12)
    with mock.patch("backbones.ssd.fast_scan", return_value=kernel):
        fast_path(small_layer(), u, torch.bfloat16)
    low, full = torch.bfloat16, torch.float32
    assert [call["types"] for call in kernel.calls] == [[low, full, full, low, low]]


def test_the_kernel_is_spared_what_it_cannot_do():
    """It knows no float64, and a single step is cheaper without."""
    kernel = FakeKernel()
    with mock.patch("backbones.ssd.fast_scan", return_value=kernel):
        fast_path(small_layer().double(), torch.randn(BATCH, 20, 12, dtype=torch.float64), torch.float32)
        layer = small_layer()
        step = functools.partial(layer.step, cache=layer.initial_cache(BATCH))
        with mock.patch.object(torch.Tensor, "is_cuda", True):
            step(torch.randn(BATCH, 1, 12))
            assert not kernel.calls
            step(torch.randn(BATCH, 2, 12))
    assert len(kernel.calls) == 1


def test_both_directions_run_on_the_kernel():
    torch.manual_seed(0)
    kernel, block, x = FakeKernel(), BidirectionalMambaBlock(32), torch.randn(1, 6, 32)
    with mock.patch("backbones.ssd.fast_scan", return_value=kernel):
        calls, _ = fast_path(block, x, torch.float32)
    assert calls == len(kernel.calls) == 2


@pytest.mark.skipif(fast_scan() is None, reason="needs CUDA and mamba-ssm")
def test_kernel_agrees_with_the_pytorch_scan():
    torch.manual_seed(0)
    layer = Mamba2(64, d_state=16, headdim=32, chunk_size=64)
    u = torch.randn(2, 130, 64)
    expected = layer(u)
    layer, u = layer.cuda(), u.cuda()
    torch.testing.assert_close(layer(u).cpu(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(layer.step(u, layer.initial_cache(2))[0].cpu(), expected, rtol=1e-2, atol=1e-2)
