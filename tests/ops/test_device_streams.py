"""Every op on CUDA: the current stream, the tensors' device, CUDA graphs, torch's own checks."""

import pytest
import torch
from strategies import same_bits
from torch.library import opcheck

from tolaria.ops import (
    MetricsField,
    blend,
    classification_metrics_,
    seed_gate,
    straight_through,
    tensor_stats,
)

pytestmark = pytest.mark.cuda


def blend_and_gradients(features):
    host, seed, alpha = (features[name].detach().requires_grad_() for name in ("host", "seed", "alpha"))
    out = blend(host, seed, alpha)
    return (out.detach(), *torch.autograd.grad(out, (host, seed, alpha), features["grad"]))


def gate_and_gradient(features):
    host = features["host"].detach().requires_grad_()
    out = seed_gate(host, features["alpha"])
    return (out.detach(), *torch.autograd.grad(out, host, features["grad"]))


def metrics(features):
    acc = torch.zeros(len(MetricsField) + 2 * 16, dtype=torch.float64, device=features["host"].device)
    classification_metrics_(acc, features["host"].view(-1, 16), features["labels"])
    return (acc,)


OPS = {
    "blend": blend_and_gradients,
    "seed_gate": gate_and_gradient,
    "straight_through": lambda features: (straight_through(features["host"], features["seed"]),),
    "tensor_stats": lambda features: (tensor_stats([features["host"], None, features["seed"]] * 600),),
    "classification_metrics_": metrics,
}
ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def features_of(rng_seed):
    """Inputs of every op, on the CPU."""
    generator = torch.Generator().manual_seed(rng_seed)
    host, seed, grad = (torch.randn(8, 4, 16, generator=generator) for _ in range(3))
    alpha = torch.randint(-1, 6, (8, 1, 1), generator=generator) / 4
    labels = torch.randint(0, 16, (32,), generator=generator)
    return {"host": host, "seed": seed, "grad": grad, "alpha": alpha, "labels": labels}


def on(device, features):
    return {name: tensor.to(device) for name, tensor in features.items()}


def assert_agree(results, expected):
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result.cpu(), value, rtol=2e-6, atol=1e-5)


@pytest.fixture
def forbid_sync():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@ops
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_on_a_side_stream_without_waiting_for_it(op, request):
    features = features_of(1)
    side, late = torch.cuda.Stream(), on("cuda", features_of(2))
    source = on("cuda", features)
    torch.cuda.synchronize()
    request.getfixturevalue("forbid_sync")
    with torch.cuda.stream(side):
        for name, tensor in source.items():  # only the side stream's order says that this comes first
            late[name].copy_(tensor)
        results = op(late)
    torch.cuda.current_stream().wait_stream(side)
    copies = [result.clone() for result in results]
    torch.cuda.set_sync_debug_mode("default")
    assert_agree(copies, op(features))


@ops
@pytest.mark.multi_gpu
def test_on_the_second_device(op):
    features = features_of(3)
    assert torch.cuda.current_device() == 0
    results = op(on("cuda:1", features))
    assert all(result.device == torch.device("cuda:1") for result in results)
    assert torch.cuda.current_device() == 0
    assert_agree(results, op(features))


@ops
def test_recorded_in_a_graph(op):
    static, graph, side = on("cuda", features_of(4)), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        op(static)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        results = op(static)
    for rng_seed in (5, 6, 6):
        features = features_of(rng_seed)
        for name, tensor in features.items():
            static[name].copy_(tensor)
        graph.replay()
        assert_agree(results, op(features))
        for result, eager in zip(results, op(static), strict=True):
            assert same_bits(result, eager)


def test_opcheck():
    host, seed, grad, alpha, labels = on("cuda", features_of(7)).values()
    alpha = alpha.clone().requires_grad_()
    library = torch.ops.tolaria
    opcheck(library.blend, (host.requires_grad_(), grad, alpha))
    opcheck(library.seed_gate, (host, alpha))
    opcheck(library.straight_through, (host, seed.requires_grad_()))
    host, seed, alpha = host.detach(), seed.detach(), alpha.detach()
    opcheck(library.seed_gate_backward, (grad, alpha))
    opcheck(library.blend_backward, (grad, host, seed, alpha, seed.dtype, [True, True, True]))
    opcheck(library.tensor_stats, ([host, None, labels],))
    acc = torch.zeros(len(MetricsField), dtype=torch.float64, device="cuda")
    opcheck(library.classification_metrics_, (acc, host.view(-1, 16), labels))
