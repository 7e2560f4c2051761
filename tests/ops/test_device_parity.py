"""CPU and CUDA: elementwise results bit for bit, reductions within bounds, nothing that waits."""

import pytest
import torch
from strategies import DTYPE_IDS, DTYPES, alpha_shapes, laid_out, same_bits

from tolaria.ops import MetricsAccumulator, blend, seed_gate, straight_through, tensor_stats

pytestmark = pytest.mark.cuda
SHAPE = (3, 4, 5, 6)


def run(function, tensors, device):
    """Result and gradients on a device, layouts kept."""
    moved = []
    for tensor in tensors:
        copy = torch.empty_like(tensor, device=device)
        moved.append(copy.copy_(tensor).requires_grad_())
    out = function(*moved)
    grad = torch.linspace(-2, 2, out.numel()).reshape(out.shape).to(out.dtype).to(device)
    return (out, *torch.autograd.grad(out, moved, grad, allow_unused=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("seed_dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("host_dtype", DTYPES, ids=DTYPE_IDS)
def test_blend_is_the_same_bit_for_bit(host_dtype, seed_dtype, layout):
    host = laid_out(torch.randn(SHAPE).to(host_dtype), layout)
    seed = laid_out(torch.randn(SHAPE).to(seed_dtype), layout)
    for shape in alpha_shapes(SHAPE)[::3]:
        alpha = torch.randint(-1, 6, shape) / 4
        cpu, cuda = (run(blend, (host, seed, alpha), device) for device in ("cpu", "cuda"))
        for here, there in zip(cpu[:3], cuda[:3], strict=True):
            assert same_bits(here, there)
            assert here.stride() == there.stride()
        torch.testing.assert_close(cpu[3], cuda[3].cpu(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 31, 4097, 70_001])
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_odd_sizes_and_unaligned_views(dtype, offset, size):
    host, seed, alpha = (torch.rand(size + offset).to(dtype)[offset:] for _ in range(3))
    moved = [torch.rand(size + offset).to("cuda", dtype)[offset:].copy_(t) for t in (host, seed, alpha)]
    assert same_bits(blend(host, seed, alpha), blend(*moved))
    assert same_bits(blend(host, seed, alpha[0]), blend(moved[0], moved[1], moved[2][0]))
    cpu, cuda = tensor_stats([host, seed]), tensor_stats(moved[:2]).cpu()
    torch.testing.assert_close(cpu[0], cuda[0], rtol=1e-12, atol=0)
    assert same_bits(cpu[1:], cuda[1:])


def test_gates_are_the_same_bit_for_bit():
    tensors = (torch.randn(SHAPE), torch.randint(-1, 2, (3, 1, 1, 1)).float())
    for function in (seed_gate, straight_through):
        inputs = tensors if function is seed_gate else (tensors[0], tensors[0] * 2)
        cpu, cuda = (run(function, inputs, device) for device in ("cpu", "cuda"))
        assert same_bits(cpu[0], cuda[0])
        assert same_bits(cpu[1], cuda[1])


def test_long_lists_take_several_tables():
    tensors = [torch.full((3,), float(i)) for i in range(2500)]
    tensors[2400][1] = float("nan")
    cpu, cuda = tensor_stats(tensors), tensor_stats([t.cuda() for t in tensors]).cpu()
    assert same_bits(cpu, cuda)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_on_a_side_stream_and_without_waiting():
    host, seed = torch.randn(1000, device="cuda", requires_grad=True), torch.randn(1000, device="cuda")
    labels, metrics = torch.arange(10, device="cuda"), MetricsAccumulator(100, device="cuda")
    alpha = torch.tensor(0.5, device="cuda", requires_grad=True)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            out = blend(host, seed_gate(seed, alpha), alpha)
            grads = torch.autograd.grad(straight_through(out, seed).sum(), (host, alpha))
            stats = tensor_stats([*grads, None])
            metrics.update(out.view(10, 100).detach(), labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    assert stats[2:].tolist() == [0.0, -1.0]
    assert metrics.compute().count == 10


def test_recorded_in_a_graph():
    host, seed = torch.randn(1000, device="cuda"), torch.randn(1000, device="cuda")
    alpha, graph = torch.tensor(0.0, device="cuda"), torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        tensor_stats([blend(host, seed, alpha)])
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        out = blend(host, seed, alpha)
        stats = tensor_stats([out])
    for value in (0.0, 0.25, 1.0):
        alpha.fill_(value)
        graph.replay()
        assert same_bits(out, blend(host, seed, alpha))
        assert same_bits(stats, tensor_stats([out]))


@pytest.mark.parametrize("learned", [False, True], ids=["ramp", "learned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_large_kernels_move_whole_sectors_and_each_byte_once(dtype, learned):
    vgpu = pytest.importorskip("vgpu", reason="counts accesses on the virtual device")
    host, seed, grad = (torch.ones(1 << 17, device="cuda", dtype=dtype) for _ in range(3))
    alpha = torch.tensor(0.5, device="cuda")
    vgpu.run_all()
    vgpu.reset()
    torch.ops.tolaria.blend_backward(grad, host, seed, alpha, dtype, [True, True, learned])
    vgpu.run_all()
    counts = vgpu.stats()["kernel_launches"].values()
    largest = max(counts, key=lambda count: count["global_load_bytes"])
    sectors = largest["global_load_sectors"] + largest["global_store_sectors"]
    assert 32 * sectors <= 1.05 * (5 if learned else 3) * host.nbytes
    assert largest["local_bytes"] == 0
