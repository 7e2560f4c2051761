"""What `build_tools/ptxas_report.py` says where it cannot compile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPORT = Path(__file__).resolve().parents[2] / "build_tools" / "ptxas_report.py"


@pytest.mark.skipif(torch.version.cuda is not None, reason="it can compile with this torch")
def test_a_torch_without_cuda_headers_is_named_before_anything_is_compiled(tmp_path: Path) -> None:
    page = tmp_path / "kernels.md"
    done = subprocess.run([sys.executable, str(REPORT), "--out", str(page)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("expected a CUDA build of torch")
    assert f"got {torch.__version__}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not page.exists()
