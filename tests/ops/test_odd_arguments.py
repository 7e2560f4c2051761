"""Calls with odd arguments work or refuse; ``build_tools/fuzz_arguments.py`` makes many more of them."""

import warnings

import fuzz_arguments
import pytest

from tolaria import _extension


@pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")
def test_some_hundred_odd_calls():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about layouts in beta
        outcomes = fuzz_arguments.run(first=0, calls=300)
    kinds = {kind.__name__ for kind in fuzz_arguments.KINDS}
    assert {name.split()[0] for name in outcomes if name.endswith("done")} == kinds
    assert {name.split()[0] for name in outcomes if name.endswith("refused")} == kinds - {"governors"}
