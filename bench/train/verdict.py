"""Does the verdict keep useful seeds and cull useless ones? Per kind and random seed, one run of `grow`.

    python bench/train/verdict.py --task digits --seeds 10

Four kinds help nothing: a scale and a shift that the next layer can take over, a seed that never moves, and
noise. Three are useful by construction. Printed are each verdict with its figures, and the shares that were
judged wrongly.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tolaria.nn import register_blueprint
from tolaria.train import grow


class Scale(nn.Module):
    """All features by one learnt factor."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros((), dtype=features.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        return x * (1.0 + self.factor)


class Shift(Scale):
    """All features by one learnt summand."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        return x + self.factor


class Still(Scale):
    """The identity, whatever it learns."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        return x + 0.0 * self.factor


class Noise(Scale):
    """The identity, with dropout."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        return nn.functional.dropout(x, 0.3, self.training) + 0.0 * self.factor


USELESS = {"bench_scale": Scale, "bench_shift": Shift, "bench_still": Still, "bench_noise": Noise}
USEFUL: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    "digits": {"conv": {}, "depthwise": {}, "depthwise ": {"kernel": 3}},
    "text": {"mlp": {"expansion": 4.0}, "attention": {}, "low_rank": {"rank": 32}},
}


def main() -> None:
    """Run all and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=sorted(USEFUL), default="digits")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name, kind in USELESS.items():
        register_blueprint(name, kind)
    kinds = [*((name, {}, False) for name in USELESS)]
    kinds += [(name, dict(options), True) for name, options in USEFUL[arguments.task].items()]
    wrong = {True: 0, False: 0}
    for rng_seed in range(arguments.seeds):
        for name, options, is_useful in kinds:
            result = grow(
                arguments.task, blueprint=name.strip(), blueprint_options=options, rng_seed=rng_seed,
                validate_every=10**9,
            )  # fmt: skip
            kept = result.outcome == "fossilized"
            wrong[is_useful] += kept != is_useful
            verdict = [seed.reason for seed in result.seeds if seed.stage.name in ("FOSSILIZED", "CULLED")]
            print(
                f"{name.strip():12} {options} seed {rng_seed}: {result.outcome}; {verdict[-1:]}", flush=True
            )
    for is_useful, said in ((False, "useless kept"), (True, "useful culled")):
        total = arguments.seeds * sum(useful is is_useful for *_, useful in kinds)
        print(f"{said}: {wrong[is_useful]} of {total}")


if __name__ == "__main__":
    main()
