"""What auto stands for, and devices that are not there."""

import pytest
import torch

from bench.core import device as module
from bench.core.device import check_device, resolve_device, resolve_precision
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
