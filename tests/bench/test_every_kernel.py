"""The program that launches every kernel does so, and tells a wrong result."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import every_kernel
import pytest
import torch

import tolaria

ROOT = Path(__file__).resolve().parents[2]
needs_extension = pytest.mark.skipif(
    not every_kernel._extension.LOADED, reason="compares the extension with the reference"
)


@needs_extension
@pytest.mark.parametrize("family", every_kernel.FAMILIES)
def test_results_are_those_of_the_reference(family, device):
    count, wrong = every_kernel.check(family, device.type)
    assert count
    assert not wrong


@needs_extension
def test_a_wrong_result_is_told(monkeypatch, capsys):
    calls = []

    def wrong_at_first(features, alpha):
        calls.append(features.shape)
        return tolaria.ops.seed_gate(features, alpha) + (1.0 if len(calls) == 1 else 0.0)

    monkeypatch.setattr(every_kernel, "seed_gate", wrong_at_first)
    monkeypatch.setattr("sys.argv", ["every_kernel.py", "--only", "gates", "--device", "cpu"])
    assert every_kernel.main() == 1
    assert "every kernel on cpu: 360 results, 1 wrong" in capsys.readouterr().out


def test_bits_and_slack_are_told_apart():
    one, near = torch.ones(3), torch.ones(3) + 1e-6
    assert every_kernel.is_same(one, one.clone(), None)
    assert not every_kernel.is_same(one, near, None)
    assert every_kernel.is_same(one, near, torch.full((3,), 1e-5))
    assert not every_kernel.is_same(one, near, torch.full((3,), 1e-9))
    assert not every_kernel.is_same(one, one.double(), None)
    assert not every_kernel.is_same(torch.tensor([float("nan")]), one[:1], torch.ones(1))


def families_of_the_page() -> Counter[str]:
    """Instances by family, from docs/kernels.md; what is compiled into several files counts once."""
    rows = re.findall(
        r"^\| (\w+_kernel[^|]*?) \| (\d+) \|", (ROOT / "docs/kernels.md").read_text(), re.MULTILINE
    )
    assert rows
    return Counter({name: int(count) for name, count in rows})


@pytest.mark.cuda
def test_no_kernel_is_left_out():
    vgpu = pytest.importorskip("vgpu", reason="tells which kernels were launched")
    from ptxas_report import demangled, family_of

    vgpu.reset()
    for family in every_kernel.FAMILIES:
        every_kernel.check(family, "cuda")
    vgpu.run_all()
    launched = [name for name in vgpu.stats()["kernel_launches"] if "tolaria" in name]
    families = Counter(family_of("", name).name for name in demangled(launched).values())
    assert families == families_of_the_page()
