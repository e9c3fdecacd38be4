"""What auto stands for, and devices that are not there."""

from types import SimpleNamespace

import pytest
import torch

from bench.core import device as module
from bench.core.device import check_device, check_memory, resolve_device, resolve_precision
from bench.core.errors import UserError


@pytest.mark.parametrize(("there", "device"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_the_gpu_where_there_is_one_and_bf16_where_the_device_has_it(monkeypatch, there, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(module, "has_fast_bf16", lambda name: name == "cuda")
    assert resolve_device("auto") == device
    assert resolve_device("cuda:3") == "cuda:3"
    assert [resolve_precision("auto", name) for name in ("cuda", "cpu")] == ["bf16", "fp32"]
    assert [resolve_precision(name, "cuda") for name in ("bf16", "fp32")] == ["bf16", "fp32"]


def test_a_device_that_is_not_there_is_one_sentence():
    check_device("cpu")
    with pytest.raises(UserError, match="device 'cuda:77' is not available here; use --device cpu"):
        check_device("cuda:77")


@pytest.mark.parametrize("device", ["cpu:0", "cpu:7", "nonsense"])
def test_the_cpu_goes_by_one_name(device):
    """Else the same run would be another."""
    with pytest.raises(UserError, match=f"device '{device}' is not available here; use --device cpu"):
        check_device(device)


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_model_that_no_memory_holds_is_refused_with_its_size(monkeypatch, device):
    """Of four bytes a parameter; what just fits is let through."""
    sizes = {"SC_PHYS_PAGES": 1_000_000, "SC_PAGE_SIZE": 4000}
    monkeypatch.setattr(module.os, "sysconf", sizes.__getitem__)
    properties = {"cuda:1": SimpleNamespace(total_memory=4_000_000_000)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    check_memory(1_000_000_000, device)
    with pytest.raises(UserError) as error:
        check_memory(1_000_000_000_000, device)
    told = f"a model of these settings takes 4,000 GB and {device} has 4 GB; "
    assert str(error.value) == told + "take less width, depth, codebook_size or code_dim"
    with pytest.raises(UserError, match="takes 4 GB"):
        check_memory(1_000_000_001, device)
