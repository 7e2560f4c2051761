"""How the benches' figures are made: turns, ratios, merging, verdicts on the bars."""

from __future__ import annotations

import itertools
import json
import math
import time

import bars
import harness
import page
import pytest
import summary
import torch
from ceilings import ceilings, mixes


def result(group, seconds, path, **absent):
    """A JSON file with one group; ``seconds`` are the samples by implementation."""
    rows = [
        {"group": group, "extra_info": {"impl": impl, "samples": samples, "absent": absent, "moved_bytes": 8}}
        for impl, samples in seconds.items()
    ]
    info = {"processor_name": "x", "threads": 2, "torch": "2", "tolaria": "0"}
    path.write_text(json.dumps({"machine_info": info, "datetime": "2026-01-01T00", "benchmarks": rows}))
    return path


def test_every_function_takes_every_place_in_turn():
    order = []
    functions = {name: (lambda name=name: order.append(name)) for name in "abc"}
    effort = harness.Effort(seconds=9.0, least_rounds=6, most_rounds=6, batch_seconds=0.0)
    samples, calls = harness.interleaved(functions, effort)
    rounds = [order[i : i + 3] for i in range(9, len(order), 3)]  # 9 calls chose the size of a batch
    assert calls == {"a": 1, "b": 1, "c": 1}
    assert all(len(found) == 6 for found in samples.values())
    assert all(sorted(found) == ["a", "b", "c"] for found in rounds)
    assert {found[0] for found in rounds} == {"a", "b", "c"}


def test_nobody_always_follows_the_same_one():
    rounds = list(itertools.islice(harness.orders("abcd"), 40))
    followed = {name: {r[r.index(name) - 1] for r in rounds if r[0] != name} for name in "abcd"}
    assert followed == {name: set("abcd") - {name} for name in "abcd"}
    assert all([r[0] for r in rounds].count(name) == 10 for name in "abcd")


def test_what_is_far_slower_than_ours_sits_rounds_out():
    effort = harness.Effort(seconds=9.0, least_rounds=8, most_rounds=8, batch_seconds=0.0)
    functions = {"ours": lambda: None, "slow": lambda: time.sleep(0.11), "also": lambda: None}
    samples, _ = harness.interleaved(functions, effort)
    assert [x is None for x in samples["slow"]] == [False] * 2 + [True] * 6
    assert None not in samples["ours"] + samples["also"]


def test_a_ratio_is_of_the_rounds_in_which_both_took_part(tmp_path):
    seconds = {"fused": [1.0, 2.0, 9.0, 4.0], "reference": [3.0, 6.0, None, 12.0]}
    group = summary.read([result("g", seconds, tmp_path / "1.json")]).groups["g"]
    assert str(group.ratio("reference", "fused")) == "3.00 (3.00-3.00)"
    assert group.timings["reference"].median == 6.0


def test_a_cold_ceiling_that_is_beaten_is_none(tmp_path):
    for fused, name in ((2.0, "ceiling (cold)"), (0.9, "ceiling (warm)")):
        seconds = {"fused": [fused] * 3, "ceiling (cold)": [1.0] * 3, "ceiling (warm)": [0.5] * 3}
        session = summary.read([result("g", seconds, tmp_path / "1.json")])
        assert session.groups["g"].ceiling == name


def test_a_ratio_of_paired_rounds_has_a_narrow_interval():
    slow_rounds = [1.0, 5.0, 2.0, 9.0, 3.0]
    found = summary.ratio([2 * x for x in slow_rounds], slow_rounds)
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)
    gap = summary.median_difference([x + 0.25 for x in slow_rounds], slow_rounds)
    assert gap.value == pytest.approx(0.25)
    assert gap.low == pytest.approx(gap.high)


def test_a_group_comes_from_the_later_file_as_a_whole(tmp_path):
    first = result("g", {"fused": [1.0], "lerp": [2.0]}, tmp_path / "1.json")
    second = result("g", {"fused": [4.0]}, tmp_path / "2.json")
    assert summary.read([first, second]).groups["g"].ratio("lerp", "fused") is None
    assert summary.read([second, first]).groups["g"].ratio("lerp", "fused").value == 2.0


def test_losses_and_failures_are_told(tmp_path):
    seconds = {"fused": [2.0] * 5, "lerp": [1.0] * 5, "reference": [3.0] * 5}
    session = summary.read([result("blend/x", seconds, tmp_path / "1.json", compiled="failed: because")])
    text = "\n".join(page.wins_and_losses(session) + page.absences(session))
    assert "ahead in 1 and behind in 1" in text
    assert "blend/x: lerp 0.50" in text
    assert "failed: because" in text


def test_bars_say_met_or_not_from_one_group_each(tmp_path):
    name = "governor_step_/n=1024"
    (bar,) = [b for b in bars.BARS if b.group == name]
    for seconds, verdict in ((59e-6, "met"), (61e-6, "NOT MET")):
        session = summary.read([result(name, {"fused": [seconds]}, tmp_path / "1.json")])
        assert bar.verdict(session)[1] == verdict
    assert bar.verdict(summary.Session({}, []))[1] == "not measured"


def test_a_ceiling_makes_the_passes_it_was_given():
    a, b = torch.ones(256), torch.ones(256)
    assert set(ceilings([([a, b], [])], torch_alone=True)) == {"ceiling (warm)"}
    assert set(ceilings([([a, b], [a])], torch_alone=True)) == {"ceiling (warm)", "ceiling (cold)"}
    assert set(ceilings([([a], [b])], torch_alone=True, fresh=False)) == {"ceiling (warm)"}
    _, cold = ceilings([([a, b], [a]), ([a], [a, b])], torch_alone=True)["ceiling (cold)"]
    assert [[t.tolist() for t in outputs] for outputs in cold()] == [[[2.0] * 256], [[1.0] * 256] * 2]


def test_our_own_loop_makes_the_passes_that_the_benches_ask_for():
    ones, nans = [torch.ones(1 << 16) for _ in range(3)], torch.full((1 << 16,), math.nan)
    for name, mix in mixes().items():
        for reads, writes in ((1, 0), (1, 1), (1, 2), (2, 1), (3, 2)):
            outputs = [torch.zeros(1 << 16) for _ in range(writes)]
            mix(ones[:reads], outputs)
            mix([nans] * reads, [torch.zeros_like(t) for t in outputs])  # what is read may be anything
            least = reads if name != "torch" else 1  # torch's operators come close for three reads
            assert all(float(out.min()) >= least for out in outputs), (name, reads, writes)


@pytest.mark.cuda
def test_on_cuda_a_batch_is_a_graphs_replay_or_calls_one_by_one():
    x, made = torch.zeros(4, device="cuda"), []

    def adds():
        made.append("add")
        x.add_(1)

    def looks():
        made.append(x.sum().item())

    timer = harness.cuda_timer(adds, 3)
    before, count = x.tolist(), len(made)
    assert timer() >= 0.0
    assert (x.tolist(), len(made)) == ([value + 3 for value in before], count)
    timer = harness.cuda_timer(looks, 2)
    count = len(made)
    assert timer() >= 0.0
    assert made[count:] == [4 * x[0].item()] * 2
