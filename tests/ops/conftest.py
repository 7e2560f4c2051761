"""Fixtures of the op tests."""

import pytest

import tolaria
from tolaria import _extension


@pytest.fixture(params=["fused", "reference"])
def backend(request):
    """Each implementation in turn."""
    if request.param == "fused" and not _extension.LOADED:
        pytest.skip("needs the compiled extension")
    with tolaria.backend(request.param):
        yield request.param
