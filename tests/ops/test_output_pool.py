"""Large CPU outputs: memory is used again only when nobody can see it, and goes back when asked."""

import gc
import os
import subprocess
import sys
import threading

import pytest
import torch

import tolaria
from tolaria import _extension
from tolaria.ops import blend, seed_gate, straight_through

pytestmark = pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")
LARGE = 1 << 19  # elements of float32: 2 MiB
ALPHA = torch.tensor(0.25)
OPS = {
    "blend": lambda host, seed: blend(host, seed, ALPHA),
    "seed_gate": lambda host, seed: seed_gate(host, ALPHA),
    "straight_through": straight_through,
}


@pytest.fixture(autouse=True)
def empty_pool():
    gc.collect()
    tolaria.release_host_memory()


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_memory_is_used_again_after_its_last_tensor(op):
    host, seed = torch.randn(2, LARGE)
    out = op(host, seed)
    place, view = out.data_ptr(), out[1:]
    del out
    assert op(host, seed).data_ptr() != place  # the view still looks at it
    del view
    assert {op(host, seed).data_ptr(), op(host, seed).data_ptr()} & {place}


def test_a_gradient_in_the_pools_memory_is_written_over():
    host, seed, other, grad = torch.randn(4, LARGE)
    host.requires_grad_()
    out = blend(blend(host, seed, ALPHA), other, ALPHA)
    with torch.profiler.profile(acc_events=True) as profile:  # 2.11 warns without
        (found,) = torch.autograd.grad(out, host, grad)
    names = [event.name for event in profile.events()]
    assert names.count("tolaria::blend_backward_") == 1
    assert torch.equal(found, grad * (1 - ALPHA) * (1 - ALPHA))


@pytest.mark.parametrize("alpha", [0.25, 0.75])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not aligned"])
@pytest.mark.parametrize(
    ("dtype", "seed_dtype"),
    [(torch.float32,) * 2, (torch.float64,) * 2, (torch.bfloat16,) * 2, (torch.float16, torch.float32)],
    ids=str,
)
def test_what_is_written_past_the_caches_has_the_same_bits(alpha, offset, dtype, seed_dtype):
    """A pass over more than the caches take against its pieces, each of which stays in."""
    n = _extension.stream_above() // (2 * dtype.itemsize) + 4321
    host, grad = (torch.randn(n).to(dtype) for _ in range(2))
    seed, alpha = torch.randn(n).to(seed_dtype), torch.tensor(alpha)
    if offset:  # an in-place backward writes where the gradient lies
        grad = torch.empty(n + offset, dtype=dtype)[offset:].copy_(grad)
    inputs = [t.requires_grad_() for t in (host, seed, alpha)]
    whole = blend(*inputs)
    found = torch.autograd.grad(whole, inputs, grad)
    total = 0.0
    for at in range(0, n, 32768):
        pieces = [t.detach()[at : at + 32768].clone().requires_grad_() for t in (host, seed)]
        part = blend(*pieces, alpha)
        wanted = torch.autograd.grad(part, [*pieces, alpha], grad[at : at + 32768].clone())
        for got, want in zip((whole, *found[:2]), (part, *wanted[:2]), strict=True):
            assert torch.equal(got[at : at + 32768], want)
        total += wanted[2].item()
    assert found[2].item() == pytest.approx(total, rel=1e-3, abs=1e-2 * n**0.5)
    assert torch.equal(straight_through(host.detach(), seed.detach()), host.detach())


def test_what_others_keep_is_left_alone():
    host, seed = torch.randn(2, LARGE)
    array = blend(host, seed, ALPHA).numpy()
    capsule = torch.from_dlpack(blend(host, seed, ALPHA))
    before = array.copy()
    for _ in range(4):
        blend(host + 1, seed, ALPHA)
    assert (array == before).all()
    assert torch.equal(capsule, torch.from_numpy(before))


def test_idle_memory_is_given_back():
    host, seed = torch.randn(2, LARGE)
    outs = [blend(host, seed, ALPHA) for _ in range(3)]
    assert tolaria.release_host_memory() == 0
    del outs
    assert tolaria.release_host_memory() == 3 * 4 * LARGE
    assert tolaria.release_host_memory() == 0


def test_no_more_is_kept_than_was_in_use_at_once():
    host, seed = torch.randn(2, 1 << 26)  # 256 MiB
    outs = [straight_through(host, seed) for _ in range(3)]
    del outs
    is_linux = sys.platform == "linux"
    eighth = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8 if is_linux else 0
    assert tolaria.release_host_memory() == (3 if eighth >= 3 << 28 else 2) << 28
    for part in (1, 0.8, 0.62):  # 256, 205 and 159 MiB: one at a time, and no block serves another
        n = int(part * len(host))
        straight_through(host[:n], seed[:n])
    assert 0 < tolaria.release_host_memory() <= 512 << 20


def test_what_nothing_fits_is_not_kept_for_ever():
    host, seed = torch.randn(2, 1 << 25)  # 128 MiB
    straight_through(host, seed)
    for _ in range(300):
        straight_through(host[:LARGE], seed[:LARGE])
    assert tolaria.release_host_memory() == 4 * LARGE


@pytest.mark.parametrize("smaller", [0.95, 0.5])
def test_a_block_serves_what_nearly_fills_it(smaller):
    host, seed = torch.randn(2, LARGE)
    place = blend(host, seed, ALPHA).data_ptr()
    n = int(LARGE * smaller)
    other = blend(host[:n], seed[:n], ALPHA)
    assert (other.data_ptr() == place) == (smaller > 0.9)
    assert torch.equal(other, torch.lerp(host[:n], seed[:n], ALPHA))


def test_outputs_can_be_resized_and_pickled(tmp_path):
    host, seed = torch.randn(2, LARGE)
    out = blend(host, seed, ALPHA)
    expected = out.clone()
    torch.save(out, tmp_path / "out.pt")
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)
    assert torch.equal(out.resize_(2 * LARGE)[:LARGE], expected)
    assert torch.equal(out.share_memory_()[:LARGE], expected)


def test_many_threads():
    wrong = []

    def work(value):
        host = torch.full((LARGE,), float(value))
        for _ in range(50):
            if not (straight_through(host, host) == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_process_has_its_own_pool():
    host, seed = torch.randn(2, LARGE)
    out = blend(host, seed, ALPHA)
    before = out.clone()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # OpenMP's own threads do not survive a fork
        del out
        os._exit(0 if torch.equal(blend(host, seed, ALPHA), before) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(out, before)


def test_lazy_copies_of_an_output_are_copies():
    host, seed = torch.randn(2, LARGE)
    out = blend(host, seed, ALPHA)
    before = out.clone()
    first, second = torch._lazy_clone(out), torch._lazy_clone(out)
    first.add_(1)
    out.mul_(2)
    assert torch.equal(first, before + 1)
    assert torch.equal(out, before * 2)
    del first, out
    assert torch.equal(second, before)
    second.neg_()  # the last to hold the memory takes it over
    assert torch.equal(second, -before)
    del second
    assert tolaria.release_host_memory() == 3 * 4 * LARGE


def run_alone(program):
    """Runs a program in a process of its own, which is to print ``ok``."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["ok"], done.stderr[-2000:]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the address space")
def test_idle_memory_goes_back_before_an_output_fails():
    run_alone("""
import resource, torch, tolaria
from tolaria.ops import straight_through
torch.set_num_threads(1)
host = torch.ones(1 << 25)  # 128 MiB
outputs = [straight_through(host, host) for _ in range(3)]
del outputs  # 384 MiB idle, in blocks that fit nothing below
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (32 << 20), resource.RLIM_INFINITY))
wide = torch.ones(1).expand(3 << 24)
kept = straight_through(wide, wide)  # 192 MiB
assert kept.sum() == 3 << 24
assert tolaria.release_host_memory() == 0
try:
    straight_through(torch.ones(1).expand(1 << 27), torch.ones(1).expand(1 << 27))
except RuntimeError as error:
    assert "memory" in str(error)
    kept = kept[:5] + straight_through(torch.ones(5), torch.ones(5))  # the pool works on
    print("ok")
""")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_while_others_are_at_the_pool_can_use_it():
    run_alone("""
import os, threading, torch, tolaria
from tolaria.ops import straight_through
torch.set_num_threads(1)
host, stop = torch.ones(1 << 18), threading.Event()
def work():
    while not stop.is_set():
        straight_through(host, host)
        tolaria.release_host_memory()
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
codes = []
for _ in range(60):
    child = os.fork()
    if child == 0:
        straight_through(host, host)
        os._exit(0 if tolaria.release_host_memory() >= host.nbytes else 1)
    codes.append(os.waitpid(child, 0)[1])
stop.set()
for thread in threads:
    thread.join()
assert not any(codes), codes
print("ok")
""")


def test_outputs_outlive_the_thread_that_made_them():
    made = []
    thread = threading.Thread(target=lambda: made.append(straight_through(*torch.ones(2, LARGE).unbind())))
    thread.start()
    thread.join()
    assert made.pop().sum() == LARGE
    assert tolaria.release_host_memory() == 4 * LARGE


def test_storage_of_an_output_can_shrink_to_nothing_and_grow_again():
    host, seed = torch.randn(2, LARGE)
    out = blend(host, seed, ALPHA)
    out.untyped_storage().resize_(0)
    assert tolaria.release_host_memory() == 4 * LARGE
    out.untyped_storage().resize_(4 * LARGE)
    assert out.fill_(3).sum() == 3 * LARGE
