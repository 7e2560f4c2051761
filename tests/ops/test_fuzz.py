"""A slice of the random calls of fuzz_ops.py, each op in turn; by hand it runs 200,000 of them."""

import fuzz_ops
import pytest

import tolaria
from tolaria import _extension

pytestmark = pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")


@pytest.mark.parametrize("name", fuzz_ops.FUZZERS)
def test_random_calls(device, name):
    with tolaria.backend("fused"):
        for number in range(60):
            fuzz_ops.run_call(0, number, device.type, name)
