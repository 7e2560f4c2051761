"""The governor's ops as ops: what torch.library asks of them. Their rule is tested in tests/governor."""

import pytest
import torch
from torch.library import opcheck

import tolaria
from tolaria import _extension
from tolaria.governor import GovernorConfig
from tolaria.ops import Order, PanicReason, StateField, governor_mailbox, governor_state, governor_step_
from tolaria.ops.governor import judge_

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


@needs_extension
def test_shortest_way_judges_alike_and_asks_for_the_host_where_it_is_needed():
    config = GovernorConfig(min_history=2, window=4, snapshot_interval=5, probation=1).to_tensor(2.3, "cpu")
    short, long = (governor_state(1, window=4) for _ in range(2))
    boxes = [governor_mailbox(1, records=8) for _ in range(2)]
    told, asked = 0, []
    for number, loss in enumerate([1.0, 1.1, 0.9, 1.0, 1.0, 1.0, float("nan"), 1.0]):
        flag = torch.tensor(number == 2)
        asked.append(judge_(short, config, torch.tensor(loss), flag, boxes[0], None, told, [], []))
        governor_step_(long, config, torch.tensor(loss), flag, None, boxes[1], None)
        assert torch.equal(short.view(torch.int64), long.view(torch.int64))
        assert torch.equal(boxes[0].view(torch.int64), boxes[1].view(torch.int64))
        told = int(short[StateField.events])
        for state in (short, long):
            state[StateField.restore_order] = 0.0  # carried out
    # Asked for by the flag, from step 5 on by the order of a capture that nobody carries out, and by the NaN.
    assert asked == [False, False, True, False, True, True, True, True]


@needs_extension
def test_shortest_way_asks_for_the_host_while_an_event_is_unread_and_in_pure_pytorch():
    config = GovernorConfig().to_tensor(2.3, "cpu")
    state, mailbox, loss = governor_state(1), governor_mailbox(1), torch.tensor(1.0)
    assert judge_(state, config, torch.tensor(float("inf")), None, mailbox, None, 0, [], [])
    state[StateField.restore_order] = 0.0
    assert judge_(state, config, loss, None, mailbox, None, 0, [], [])
    assert not judge_(state, config, loss, None, mailbox, None, 1, [], [])
    with tolaria.backend("reference"):
        assert judge_(state, config, loss, None, mailbox, None, 1, [], [])
    assert state[StateField.step].item() == 4


@needs_extension
@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"loss": torch.ones(2)}, ValueError, "loss: expected one value for each"),
        ({"loss": torch.tensor(1)}, TypeError, "loss: expected float64, float32"),
        ({"loss": 1.0}, TypeError, "loss: expected a tensor, got float"),
        ({"config": None}, TypeError, "config: expected a tensor, got NoneType"),
        ({"nonfinite": torch.ones(3)}, ValueError, "nonfinite: expected one value"),
        ({"mailbox": torch.ones(3)}, ValueError, "mailbox: expected a contiguous float64 matrix"),
        ({"told": "none"}, TypeError, "must be real number"),
        ({"sizes": None}, TypeError, "optimizers, sizes: expected two lists"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_shortest_way_refuses_what_the_op_refuses(changed, error, said):
    state, config = governor_state(1), GovernorConfig().to_tensor(2.3, "cpu")
    before = state.clone()
    arguments = {
        "state": state,
        "config": config,
        "loss": torch.tensor(1.0),
        "nonfinite": None,
        "mailbox": governor_mailbox(1),
        "gradient": None,
        "told": 0,
        "optimizers": [],
        "sizes": [],
    }
    with pytest.raises(error, match=said):
        judge_(**arguments | changed)
    assert torch.equal(state, before)


@needs_extension
def test_shortest_way_leaves_the_op_to_a_compiler():
    config = GovernorConfig().to_tensor(2.3, "cpu")
    state, mailbox = governor_state(1), governor_mailbox(1)

    @torch.compile(backend="eager", fullgraph=True)
    def judged(loss):
        return judge_(state, config, loss * 2, None, mailbox, None, 0, [], [])

    for loss in (1.0, 2.0):
        assert judged(torch.tensor(loss))
    assert state[StateField.loss].item() == 4.0


@needs_extension
def test_shortest_way_asks_for_the_host_where_groups_have_grown():
    config = GovernorConfig().to_tensor(2.3, "cpu")
    state, mailbox = governor_state(1), governor_mailbox(1)
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(5)]
    first, second = (torch.optim.SGD(w, lr=0.1) for w in (weights[:1], weights[1:3]))

    def asks(optimizers, sizes):
        return judge_(state, config, torch.tensor(1.0), None, mailbox, None, 0, optimizers, sizes)

    assert not asks([first, second], [1, 2])
    assert asks([first, second], [1])
    assert asks([first], [1, 2])
    second.add_param_group({"params": weights[3:4]})
    assert asks([first, second], [1, 2])
    assert not asks([first, second], [1, 2, 1])
    second.load_state_dict(second.state_dict())  # other lists
    second.param_groups[0]["params"].append(weights[4])
    assert asks([first, second], [1, 2, 1])
    assert not asks([first, second], [1, 3, 1])
    del second.param_groups[1]["params"]
    assert asks([first, second], [1, 3, 1])
    assert asks([None], [1])
