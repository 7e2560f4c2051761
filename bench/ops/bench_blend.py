"""blend and seed_gate: torch.lerp with clamp, the reference, its compilation, the memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import KIB, MIB, Elementwise, sample, sweep
from compiled import compiled
from harness import QUICK, Effort
from torch import Tensor

from tolaria import ops
from tolaria.reference import blend as reference

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, from inside torch.compile


def lerp(host: Tensor, seed: Tensor, alpha: Tensor) -> Tensor:
    """The strongest short form in eager PyTorch (it lets a NaN of the unused side through)."""
    return torch.lerp(host, seed, alpha.clamp(0, 1).to(host.dtype))


COMPILED = {"blend": compiled(reference.blend), "seed_gate": compiled(reference.seed_gate)}


def in_quick(case: Elementwise) -> bool:
    if case.one_thread or case.layout != "contiguous":
        return False
    if case.dtype == torch.bfloat16:
        return case.size == 8 * MIB and case.direction == "both"
    if case.direction.startswith("both"):
        return case.size in (4 * KIB, 32 * KIB, 128 * KIB, 8 * MIB, 64 * MIB)
    return case == Elementwise("forward", 8 * MIB)


def is_barred(case: Elementwise) -> bool:
    """Whether the page judges it beside the compiler and the ceiling."""
    plain = case.dtype == torch.float32 and case.layout == "contiguous" and not case.one_thread
    return plain and case.size in (8 * MIB, 64 * MIB) and case.direction.startswith("both")


def agrees(case: Elementwise, expected: list[Tensor]) -> Callable[[object], None]:
    """Compare samples with what float64 says; a gradient of alpha is a sum of many rounded terms."""
    rough = case.dtype == torch.bfloat16

    def check(result: object) -> None:
        results = [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]
        for got, want in zip(results, expected, strict=True):
            close = 2e-2 if rough else 1e-5
            if want.numel() == 1:
                close = (0.1 if rough else 2e-3) * (case.size / case.dtype.itemsize) ** 0.5
            got = sample(got).double().view_as(want)
            torch.testing.assert_close(got, want, rtol=2e-2 if rough else 1e-4, atol=close)

    return check


def directions(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor
) -> dict[str, Callable[[], object]]:
    """The three ways to time an op; the graph of ``backward`` is made once, outside the timing."""
    wanted = [t for t in inputs if t.requires_grad]

    def both() -> object:
        return torch.autograd.grad(function(*inputs), wanted, grad)

    kept: list[Tensor] = []

    def backward() -> object:
        if not kept:
            kept.append(function(*inputs))
        return torch.autograd.grad(kept[0], wanted, grad, retain_graph=True)

    return {
        "forward": lambda: function(*(t.detach() for t in inputs)),
        "backward": backward,
        "both": both,
    }


def ahead(effort: Effort) -> None:
    """Compile what is compared with the compiler in ``--quick``, before anything is timed."""
    if effort is QUICK:
        for needs_alpha in (False, True):
            host, seed, grad = (torch.randn(2 * MIB, requires_grad=k < 2) for k in range(3))
            alpha = torch.tensor(0.3, requires_grad=needs_alpha)
            directions(COMPILED["blend"], (host, seed, alpha), grad)["both"]()


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, host, seed, alpha):
        ctx.value = value = alpha.item()
        ctx.save_for_backward(*((host, seed) if ctx.needs_input_grad[2] else ()))
        return host.clone() if value <= 0 else seed.clone() if value >= 1 else torch.lerp(host, seed, value)

    @staticmethod
    def backward(ctx, grad):
        host, seed = ctx.saved_tensors or (None, None)
        grad_alpha = None if host is None else torch.dot(grad.flatten(), (seed - host).flatten())
        return grad * (1 - ctx.value), grad * ctx.value, grad_alpha


def branch(host: Tensor, seed: Tensor, alpha: Tensor) -> Tensor:
    """The best eager form that keeps a NaN out, for ``0 < alpha < 1``: it looks at alpha on the host."""
    return _Branch.apply(host, seed, alpha)


BLEND = {
    "fused": ops.blend,
    "reference": reference.blend,
    "compiled": COMPILED["blend"],
    "lerp": lerp,
    "branch": branch,
}


@pytest.mark.parametrize(
    "case", sweep(["forward", "backward", "both", "backward+alpha", "both+alpha"], in_quick)
)
def bench_blend(case, measure, device):
    host, seed, grad = case.tensors(3, device)
    alpha = torch.tensor(0.3, device=device)
    host.requires_grad_()
    seed.requires_grad_()
    direction, _, with_alpha = case.direction.partition("+")
    alpha.requires_grad_(bool(with_alpha))
    inputs = (host, seed, alpha)
    with torch.no_grad():
        h, s, g = (sample(t).double() for t in (host, seed, grad))
        if direction == "forward":
            expected = [torch.lerp(h, s, 0.3)]
        else:
            expected = [
                0.7 * g,
                0.3 * g,
                *([(grad * (seed - host)).sum(dtype=torch.float64)] if with_alpha else []),
            ]
        del h, s, g
    forward = ([host, seed], [host])
    backward = ([grad, *([host, seed] if with_alpha else [])], [host, seed])
    passes = {"forward": [forward], "backward": [backward], "both": [forward, backward]}
    measure(
        f"blend/{case.name}",
        {name: directions(function, inputs, grad)[direction] for name, function in BLEND.items()},
        check=agrees(case, expected),
        passes=passes[direction],
        autograd=direction == "both" and device == "cpu",
        one_thread=case.one_thread,
        full_only=("compiled",)
        if not is_barred(case)
        else ("reference", "branch")
        if case.size > 8 * MIB
        else (),
        longer=case.longer,
    )


def hooked(features: Tensor, alpha: Tensor) -> Tensor:
    """The gate as a tensor hook on a copy, as one writes it without an autograd function."""
    gated = features.clone()
    if gated.requires_grad:
        gated.register_hook(lambda grad: torch.where(alpha <= 0, 0.0, grad))
    return gated


GATE = {
    "fused": ops.seed_gate,
    "reference": reference.seed_gate,
    "compiled": COMPILED["seed_gate"],
    "hook": hooked,
}


@pytest.mark.parametrize(
    "case", sweep(["forward", "backward", "both"], lambda c: c == Elementwise("both", 8 * MIB))
)
def bench_seed_gate(case, measure, device):
    features, grad = case.tensors(2, device)
    alpha = torch.tensor(0.3, device=device)
    inputs = (features.requires_grad_(), alpha)
    forward, backward = ([features], [features]), ([grad], [grad])
    passes = {"forward": [forward], "backward": [backward], "both": [forward, backward]}
    measure(
        f"seed_gate/{case.name}",
        {name: directions(function, inputs, grad)[case.direction] for name, function in GATE.items()},
        check=agrees(case, [sample(features if case.direction == "forward" else grad).double()]),
        longer=min(1, case.longer),
        passes=passes[case.direction],
        autograd=case.direction == "both" and device == "cpu",
        one_thread=case.one_thread,
    )
