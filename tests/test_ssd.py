"""The SSD scan and the Mamba-2 layer, held against their definitions written out here one step at a time."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from backbones.ssd import Mamba2, fast_scan, scan_backend, ssd_scan, ssd_step

BATCH, HEADS, HEAD_DIM, STATE_DIM = 2, 4, 3, 5


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
    layer = Mamba2(256, headdim=4, A_init_range=(2, 3), dt_min=0.01, dt_max=0.2, dt_init_floor=0.05)
    dt, A = F.softplus(layer.dt_bias), layer.A_log.exp()
    assert 0.05 - 1e-6 <= dt.min() < 0.051, "half of the steps should sit on the floor"
    assert 0.15 < dt.max() <= 0.2 + 1e-6
    assert 2 - 1e-6 <= A.min() < 2.2 < 2.8 < A.max() <= 3 + 1e-6
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


def test_bf16_autocast_is_close_to_float32_and_keeps_a_float32_state():
    layer = small_layer()
    u = torch.randn(BATCH, 20, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(u)
        out.float().square().sum().backward()  # a backward pass inside autocast is legal as well
        stepped, cache = layer.step(u, layer.initial_cache(BATCH))
    assert out.dtype == torch.bfloat16
    assert {t.dtype for t in cache} == {torch.float32}
    assert torch.equal(out, stepped)
    torch.testing.assert_close(out.float(), layer(u), rtol=0.05, atol=0.05)
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


@pytest.mark.skipif(fast_scan() is None, reason="needs CUDA and mamba-ssm")
def test_kernel_agrees_with_the_pytorch_scan():
    torch.manual_seed(0)
    layer = Mamba2(64, d_state=16, headdim=32, chunk_size=64)
    u = torch.randn(2, 130, 64)
    expected = layer(u)
    layer, u = layer.cuda(), u.cuda()
    torch.testing.assert_close(layer(u).cpu(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(layer.step(u, layer.initial_cache(2))[0].cpu(), expected, rtol=1e-2, atol=1e-2)
