"""Copies of host-side values: data is copied, what is alive stays what it is."""

from __future__ import annotations

import torch
from torch import nn

from tolaria.snapshot.host_copy import HostCopy, is_plain, refill


def test_data_is_copied_and_can_be_put_back_again_and_again() -> None:
    tensor = torch.ones(2)
    value = {"numbers": [1, 2.0, (3,)], "tensor": tensor, "names": {"a"}}
    copied = HostCopy.of(value)
    tensor.zero_()
    value["numbers"].append(4)  # type: ignore[attr-defined]
    for _ in range(2):
        fresh = copied.fresh()
        assert fresh["numbers"] == [1, 2.0, (3,)]
        assert fresh["tensor"].tolist() == [1.0, 1.0]
        fresh["numbers"].clear()
        fresh["tensor"].fill_(7.0)
    assert [t.tolist() for t in copied.tensors()] == [[1.0, 1.0]]


def test_in_what_an_optimizer_holds_the_living_stays_what_it_is() -> None:
    layer, parameter = nn.Linear(2, 2), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    generator = torch.Generator()
    value = [layer, layer.forward, optimizer, generator, len, {"p": parameter}]
    fresh = HostCopy.of_settings(value, [parameter]).fresh()
    assert fresh[0] is layer
    assert fresh[1].__self__ is layer
    assert fresh[2] is optimizer
    assert fresh[3] is generator
    assert fresh[5]["p"] is parameter


def test_in_a_state_an_optimizer_stays_and_a_module_is_copied_with_its_methods() -> None:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    module, call, step = HostCopy.of([layer, layer.forward, optimizer.zero_grad]).fresh()
    assert module is not layer
    assert call.__self__ is module
    assert step.__self__ is optimizer


def test_a_scheduler_within_a_value_gets_its_attributes_back() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
    inner = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    copied = HostCopy.of({"after": [inner]})
    optimizer.step()
    inner.step()
    assert inner.last_epoch == 1
    assert copied.fresh()["after"][0] is inner
    assert inner.last_epoch == 0
    assert inner.optimizer is optimizer


def test_what_is_plain() -> None:
    assert is_plain({"a": [1, "x", None, torch.ones(1), (2.0, {3})]})
    assert not is_plain([nn.Linear(1, 1)])
    assert not is_plain({"f": len})
    assert not is_plain([object()])


def test_refilled_containers_and_tensors_stay_the_same_objects() -> None:
    inner = {"x": torch.zeros(2)}
    live = {"inner": inner, "late": 1}
    tensor = inner["x"]
    assert refill(live, {"inner": {"x": torch.ones(2)}, "n": 3}) is live
    assert live["inner"] is inner
    assert inner["x"] is tensor
    assert tensor.tolist() == [1.0, 1.0]
    assert "late" not in live
    assert refill(torch.zeros(2), replaced := torch.ones(3)) is replaced
