"""The governor's ops as ops: what torch.library asks of them. Their rule is tested in tests/governor."""

import pytest
import torch
from torch.library import opcheck

from tolaria import _extension
from tolaria.governor import GovernorConfig
from tolaria.ops import Order, PanicReason, governor_mailbox, governor_state

needs_extension = pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")


@needs_extension
@pytest.mark.parametrize("n", [1, 3])
def test_opcheck(n):
    config = GovernorConfig().to_tensor(2.3, "cpu")
    state, mailbox, loss = governor_state(n), governor_mailbox(n), torch.rand(n)
    flags = torch.ones(n, dtype=torch.bool)
    opcheck(torch.ops.tolaria.governor_step_, (state, config, loss))
    opcheck(torch.ops.tolaria.governor_step_, (state, config, loss, ~flags, flags, mailbox))
    order = (int(Order.ROLLBACK), int(PanicReason.MANUAL))
    opcheck(torch.ops.tolaria.governor_order_, (state, config, 0, *order, -1, mailbox))
