"""The stem rule: every op has a kernel, a fake, a wrapper, a reference, an opcheck case and a bench."""

import re
from pathlib import Path

import pytest
import torch

from tolaria import _extension, ops

ROOT = Path(__file__).resolve().parent.parent
REGISTRATION = (ROOT / "csrc" / "registration.cpp").read_text()
SCHEMAS = re.findall(r'm\.def\(\s*"(\w+)\((.*)', REGISTRATION)
OPS = [name for name, arguments in SCHEMAS if arguments.startswith("Tensor")]  # the rest works on no data
FORWARDS = [name for name in OPS if not name.rstrip("_").endswith("_backward")]
STEMS = {
    "blend": "blend",
    "blend_backward": "blend",
    "blend_backward_": "blend",
    "seed_gate": "blend",
    "seed_gate_backward": "blend",
    "seed_gate_backward_": "blend",
    "straight_through": "straight_through",
    "tensor_stats": "stats",
    "classification_metrics_": "metrics",
    "governor_step_": "governor",
    "governor_order_": "governor",
    "snapshot_capture_": "snapshot",
    "snapshot_restore_": "snapshot",
}
needs_extension = pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")


def text_of(pattern):
    """The text of all files that match, to look for names in."""
    return "\n".join(path.read_text() for path in sorted(ROOT.glob(pattern)))


def test_every_schema_has_a_stem():
    assert sorted(STEMS) == sorted(OPS)


@needs_extension
@pytest.mark.parametrize("op", OPS)
def test_op_has_kernels(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tolaria::{op}", "CPU")
    if _extension.CUDA:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tolaria::{op}", "CUDA")


@needs_extension
@pytest.mark.parametrize("op", OPS)
def test_op_that_returns_a_tensor_has_a_fake(op):
    packet = getattr(torch.ops.tolaria, op).default
    if packet._schema.returns:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tolaria::{op}", "Meta")


@pytest.mark.parametrize("op", OPS)
def test_op_has_its_files(op):
    stem = STEMS[op]
    for path in (f"csrc/cpu/{stem}.cpp", f"tolaria/ops/{stem}.py", f"tolaria/reference/{stem}.py"):
        assert (ROOT / path).is_file(), f"{op}: expected {path}"
    assert list(ROOT.glob(f"tests/*/test_{stem}*.py")), f"{op}: expected a test_{stem}.py"
    assert (ROOT / "bench" / "ops" / f"bench_{stem}.py").is_file(), f"{op}: expected a bench_{stem}.py"


@pytest.mark.parametrize("op", FORWARDS)
def test_op_is_benched(op):
    assert re.search(rf"\bops\.{op}\b", text_of("bench/ops/bench_*.py")), op


@pytest.mark.parametrize("op", FORWARDS)
def test_op_has_a_documented_wrapper(op):
    wrapper = getattr(ops, op)
    assert op in ops.__all__
    assert "Args:" in wrapper.__doc__


@pytest.mark.parametrize("op", OPS)
def test_op_has_an_opcheck_case(op):
    assert re.search(rf"torch\.ops\.tolaria\.{op}\b", text_of("tests/*/test_*.py")), op
