"""build_tools/processors.py without the builds, and the results that it compares."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import processors
import pytest
import result_hashes
import torch
from result_hashes import Source

import tolaria
from tolaria import _extension

needs_extension = pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")
RESULTS: processors.Results = {
    "exact": {"blend": "12ab", "stats": "34cd"},
    "bounded": {"metrics": 8.0, "more metrics": 5.0},
}


def test_equal_results_are_told():
    finding = processors.Finding("arm")
    processors.compare(RESULTS, copy.deepcopy(RESULTS), finding)
    assert str(finding) == "arm: passed: 2 results equal bit for bit, 2 of 2 sums of metrics equal, 0 off"


@pytest.mark.parametrize(
    ("kind", "name", "value", "said"),
    [
        ("exact", "blend", "12ac", "1 of 2 results differ: blend"),
        ("exact", "blend", None, "1 of 2 results differ: blend"),
        ("exact", "other", "1", r"1 of 2 results differ: other \(only there\)"),
        ("bounded", "metrics", 8.0 * (1 + 1e-7), "metrics is off by 1.0e-07"),
        ("bounded", "metrics", float("nan"), "metrics is off by nan"),
        ("bounded", "metrics", None, r"metrics is off by 1.0e\+00"),
    ],
)
def test_a_difference_is_a_failure(kind, name, value, said):
    there = copy.deepcopy(RESULTS)
    if value is None:
        del there[kind][name]
    else:
        there[kind][name] = value
    finding = processors.Finding("arm")
    processors.compare(RESULTS, there, finding)
    assert re.match(said, finding.failures[0])


def test_a_sum_within_its_bound_is_none():
    there = copy.deepcopy(RESULTS)
    there["bounded"]["metrics"] = 8.0 * (1 + 1e-10)
    finding = processors.Finding("nehalem")
    processors.compare(RESULTS, there, finding)
    assert str(finding).endswith("1 of 2 sums of metrics equal, 1e-10 off")


def test_a_part_without_its_programs_is_skipped_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for part, (_, programs) in processors.PARTS.items():
        finding = processors.check(part, tmp_path, lambda: pytest.fail("is not to be run"))
        assert str(finding) == f"{part}: passed: SKIPPED, there is no {programs[0]}"


def test_a_build_that_warns_or_breaks_is_a_failure(monkeypatch, tmp_path):
    def warn(*_, **__):
        return "csrc/cpu/blend.cpp:3:1: warning: unused\ntorch/a.h:1:1: warning: not ours\n"

    monkeypatch.setattr(processors.sanitize, "copy_tree", lambda folder: None)
    finding = processors.Finding("clang")
    monkeypatch.setattr(processors, "run", warn)
    processors.build(tmp_path, [sys.executable], {}, finding)
    assert finding.failures == ["1 warnings, first: csrc/cpu/blend.cpp:3:1: warning: unused"]
    monkeypatch.undo()
    command = [sys.executable, "-c", "import sys; print('last words'); sys.exit(3)"]
    monkeypatch.setitem(processors.PARTS, "broken", (lambda *_: processors.run(command), ()))
    finding = processors.check("broken", tmp_path, dict)
    assert "ended with status 3:\nlast words" in str(finding)


@pytest.mark.parametrize("failures", [[], ["it broke"]])
def test_the_exit_status_and_the_last_line_say_what_failed(monkeypatch, capsys, failures):
    monkeypatch.setattr(sys, "argv", ["processors.py", "haswell", "arm"])
    monkeypatch.setattr(
        processors, "check", lambda part, *_: processors.Finding(part, failures if part == "arm" else [])
    )
    assert processors.main() == len(failures)
    assert capsys.readouterr().out.endswith(f"{2 - len(failures)} of 2 parts passed or skipped\n")


def test_clang_without_openmp_refuses_the_flag(monkeypatch, tmp_path):
    monkeypatch.setattr(processors, "build", lambda *_: None)
    monkeypatch.setattr(processors, "results", lambda *_: RESULTS)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "clang++").write_text('#!/bin/sh\necho "compiled $@"\n')
    (tmp_path / "clang++").chmod(0o755)
    processors.clang_serial(tmp_path, RESULTS, processors.Finding("clang-serial"))
    wrapper = str(tmp_path / "clang++-without-openmp")
    assert subprocess.run([wrapper, "a.cpp", "-fopenmp"], check=False).returncode == 1
    said = subprocess.run([wrapper, "a.cpp", "-O3"], capture_output=True, text=True, check=True).stdout
    assert said == "compiled a.cpp -O3\n"


@pytest.mark.parametrize("dtype", result_hashes.FLOATS.values(), ids=result_hashes.FLOATS)
def test_inputs_hold_what_is_odd_and_are_the_same_everywhere(dtype):
    values, plain = Source(1).floats(4000, dtype, odd=True), Source(1).floats(4000, dtype)
    assert plain.isfinite().all()
    assert (plain.abs() >= 1 / 16).all()
    assert (plain.abs() < 16).all()
    assert (plain < 0).any()
    limits = torch.finfo(dtype)
    zeros = values[values == 0]
    assert {float(zero.sign()) for zero in zeros} == {0.0}
    assert torch.signbit(zeros).any()
    assert not torch.signbit(zeros).all()
    assert values.isnan().any()
    for special in (float("inf"), -float("inf"), limits.max, limits.min, limits.tiny, limits.smallest_normal):
        assert (values == special).any(), special
    assert ((values.abs() > 0) & (values.abs() < limits.tiny)).any()  # denormal
    known = {
        torch.float32: "8ece7144e6e6f3b9",
        torch.float64: "1f03cad6071d63c6",
        torch.float16: "0ef30ab8c150b704",
        torch.bfloat16: "e44ecb2de8492da5",
    }
    assert result_hashes.digest([values]) == known[dtype]


def test_computed_nans_are_one_and_all_else_keeps_its_bits():
    bits = torch.tensor([0x7FC00000, -0x3FFFFB, 0x7F800001, -0x80000000, 0x3F800000]).int()
    made = result_hashes.one_nan(bits.view(torch.float32)).view(torch.int32)
    assert made.tolist() == [0x7FC00000] * 3 + [-0x80000000, 0x3F800000]


@needs_extension
def test_a_hash_is_of_bits():
    first = result_hashes.digest([torch.tensor([0.0, 1.0])])
    assert first == hashlib.sha256(b"torch.float32 (2,)" + bytes(6) + b"\x80\x3f").hexdigest()[:16]
    assert first != result_hashes.digest([torch.tensor([-0.0, 1.0])])
    assert first != result_hashes.digest([torch.tensor([[0.0, 1.0]])])


@needs_extension
def test_every_op_has_results_and_threads_do_not_change_them():
    cases = [*result_hashes.blends(), *result_hashes.gates(), *result_hashes.statistics()]
    names = [name for name, _ in cases]
    assert len(set(names)) == len(names) > 100
    assert all(tensors and all(t.numel() for t in tensors) for _, tensors in cases)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        kinds = (result_hashes.blends, result_hashes.gates, result_hashes.statistics)
        again = {name: result_hashes.digest(found) for kind in kinds for name, found in kind()}
    finally:
        torch.set_num_threads(before)
    assert [name for name, found in cases if result_hashes.digest(found) != again[name]] == []


@pytest.mark.slow
@needs_extension
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64")
def test_a_processor_without_avx_computes_the_same_bits():
    """All but the metrics, which may fuse: ``build_tools/processors.py`` compares those as well."""
    program = """
import json, result_hashes
kinds = (result_hashes.gates, result_hashes.statistics, result_hashes.governors, result_hashes.snapshots)
print(json.dumps({name: result_hashes.digest(found) for kind in kinds for name, found in kind()}))
"""
    path = [Path(result_hashes.__file__).parent, Path(tolaria.__file__).resolve().parents[1]]
    settings = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, path)), OMP_NUM_THREADS="1")
    said = [
        subprocess.run(
            [*emulator, sys.executable, "-c", program],
            env=settings,
            capture_output=True,
            text=True,
            check=True,
        )
        for emulator in ((), ("qemu-x86_64", "-cpu", "Nehalem"))
    ]
    here, there = (json.loads(done.stdout) for done in said)
    assert here == there
