"""Which implementation an op takes, by device."""

from __future__ import annotations

import types

import pytest
import torch

import tolaria
from tolaria import _backend, _extension
from tolaria._build.info import BuildInfo, has_kernels_for
from tolaria.cli.doctor import doctor, render
from tolaria.errors import ExtensionMissingError
from tolaria.ops import blend

DEFAULT = ("8.0", "9.0+PTX")


@pytest.mark.parametrize(
    ("archs", "capability", "fits"),
    [
        (DEFAULT, (7, 5), False),
        (DEFAULT, (8, 0), True),
        (DEFAULT, (8, 9), True),  # machine code of the same major version
        (DEFAULT, (9, 0), True),
        (DEFAULT, (12, 1), True),  # the PTX of 9.0
        (("8.6",), (8, 0), False),  # a smaller minor version
        (("8.0", "9.0"), (10, 0), False),  # no PTX
        (("8.0+PTX", "9.0"), (10, 0), True),
        (("9.0a+PTX",), (10, 0), False),  # for 9.0 alone
        (("9.0a",), (9, 0), True),
        (("10.0f",), (10, 3), True),  # for its family
        (("10.0f+PTX",), (12, 0), False),
        (("7.5+PTX",), (7, 0), False),
        (("Turing",), (6, 1), True),  # unknown
        ((), (8, 0), False),
    ],
)
def test_rule_of_compatibility(archs, capability, fits):
    assert has_kernels_for(archs, capability) is fits


@pytest.fixture
def old_device(monkeypatch):
    """A second device that the extension was not built for, as torch would report it."""
    info = BuildInfo(extension=True, reason="a test", python="3", cuda="13.0", archs=DEFAULT)
    monkeypatch.setattr(_extension, "CUDA", True)
    monkeypatch.setattr(_extension, "LOADED", True)
    monkeypatch.setattr(_extension, "INFO", info)
    monkeypatch.setattr(_backend, "without_kernels", {})
    monkeypatch.setattr(_backend, "_warned", set())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(8, 0), (7, 5)][index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    _backend._look_at_devices()


def on(index):
    device = torch.device("cuda", index)
    return types.SimpleNamespace(is_cpu=False, is_meta=False, is_cuda=True, device=device)


@pytest.mark.usefixtures("old_device")
def test_device_without_kernels_runs_the_reference_and_says_so_once():
    with tolaria.backend("auto"):
        assert _backend.fused(on(0))
        sentence = r"pure PyTorch. cuda:1: expected .*8.0;9.0\+PTX.*, got Tesla T4 of .* 7.5; set TORCH_CUDA"
        with pytest.warns(RuntimeWarning, match=sentence):
            assert not _backend.fused(on(1))
        assert not _backend.fused(on(1))  # a second warning would be an error


@pytest.mark.usefixtures("old_device")
def test_fused_refuses_a_device_without_kernels():
    with tolaria.backend("fused"):
        assert _backend.fused(on(0))
        with pytest.raises(ExtensionMissingError, match=r"'fused': cuda:1: expected .* 7.5; set TORCH_CUDA"):
            _backend.fused(on(1))
    with tolaria.backend("reference"):
        assert not _backend.fused(on(1))


@pytest.mark.usefixtures("old_device")
def test_doctor_tells_device_by_device(monkeypatch):
    monkeypatch.setattr("tolaria.cli.doctor._devices", lambda: ())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    report = doctor()
    assert report.ops == {"cpu": "fused", "cuda:0": "fused", "cuda:1": "reference"}
    assert "advice: ops run in pure PyTorch there, 'fused' is refused: cuda:1: expected" in render(report)


@pytest.mark.cuda
def test_ops_run_where_the_extension_has_no_kernels(monkeypatch):
    """Looked at anew, as if the device were of another kind; on the virtual device VGPU_CC=7.5 is one."""
    monkeypatch.setattr(_backend, "without_kernels", {})
    monkeypatch.setattr(_backend, "_warned", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (3, 5))
    _backend._look_at_devices()
    host, seed = torch.randn(4, 5, device="cuda"), torch.randn(4, 5, device="cuda")
    alpha = torch.tensor(0.25, device="cuda")
    with tolaria.backend("auto"), pytest.warns(RuntimeWarning, match=r"capability 3\.5"):
        out = blend(host, seed, alpha)
    with tolaria.backend("reference"):
        assert torch.equal(out, blend(host, seed, alpha))
    with tolaria.backend("fused"), pytest.raises(ExtensionMissingError, match=r"capability 3\.5"):
        blend(host, seed, alpha)
