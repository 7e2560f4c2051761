"""The arena: runs that can be repeated, a truth that is written down, and what a row of the table counts."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from arena import truths
from arena.branches import branch
from arena.contestants import CONTESTANTS, PACKAGES, Contestant
from arena.harms import Nobody
from arena.runs import BEGIN, HARMS, PROBLEMS, Fate, Run, Truth, runs, truth
from arena.runs import truths as truths_of
from arena.scores import Result, row, table, watched, watched_training

SHORT = {problem.name: dataclasses.replace(problem, steps=BEGIN + 5) for problem in PROBLEMS}


class Looking(Contestant):
    """Does nothing."""

    def saw(self, step, loss):
        self.alarms.append(step)


@pytest.mark.parametrize("name", SHORT)
def test_a_run_is_the_same_run_whoever_looks(name):
    problem = SHORT[name]
    pytest.importorskip("sklearn")
    losses = []
    for watch in (None, Looking):
        for harm in (None, "rate x 3 for 10"):
            run = Run(problem, problem.batches[0], problem.rates[0], 0, harm)
            learner = run.learner()
            who = watch(learner, acts=True) if watch else Nobody()
            losses.append([float(run.step(learner, step, who)) for step in range(BEGIN - 145)])
    assert losses[0] == losses[1] == losses[2] == losses[3]
    assert len(set(losses[0])) > 1


@pytest.mark.parametrize("name", sorted(HARMS))
def test_a_harm_begins_at_its_step_and_not_before(name):
    pytest.importorskip("sklearn")
    harm = dataclasses.replace(HARMS[name], begin=3)
    states = []
    for befallen in (False, True):
        learner = Run(SHORT["digits"], 16, 0.05, 0).learner()
        states.append([_step(learner, step, harm if befallen else None) for step in range(5)])
    assert states[0][:3] == states[1][:3]
    assert states[0][3:] != states[1][3:]


def _step(learner, step, harm):
    from arena.harms import Harm, take_step

    loss = take_step(learner, step, harm if harm is not None else Harm(), Nobody())
    state = [*learner.model.state_dict().values(), *learner.optimizers[0].state_dict()["state"].values()]
    tensors = [t for entry in state for t in (entry.values() if isinstance(entry, dict) else [entry])]
    return str(float(loss)), str([t.double().sum().item() for t in tensors if torch.is_tensor(t)])


def test_the_truth_knows_a_dead_run_from_one_that_recovers():
    pytest.importorskip("sklearn")
    problem = next(p for p in PROBLEMS if p.name == "two classes")
    fates = [
        truth(Run(problem, 64, 1e-3, 0, harm)).fate
        for harm in (None, "NaN in a weight", "all labels wrong, one batch")
    ]
    assert fates == [Fate.HEALTHY, Fate.BROKEN, Fate.RECOVERS]


def test_the_committed_truth_has_every_run_of_its_seeds():
    known = truths.committed()
    seeds = sorted({int(name.split("seed ")[1].split(":")[0]) for name in known})
    assert {seed % 2 for seed in seeds} == {0, 1}  # half of them are held out of tuning
    everything = [*runs(tuple(seeds), harmed=True), *runs(tuple(seeds), harmed=False)]
    assert {str(run) for run in everything} == set(known)
    assert set(known.values()) == set(Fate)


def test_a_truth_that_is_written_is_read_again_and_compared(tmp_path):
    run = Run(PROBLEMS[0], 16, 0.01, 0, "NaN in a weight")
    other = Run(PROBLEMS[-1], 8, 1e-3, 3, "growing weights")
    calm = dataclasses.replace(other, harm=None)
    file = tmp_path / "truth.txt"
    truths.write([(run, Fate.BROKEN), (other, Fate.RECOVERS), (calm, Fate.HEALTHY)], file)
    assert truths.committed(file) == {
        str(run): Fate.BROKEN,
        str(other): Fate.RECOVERS,
        str(calm): Fate.HEALTHY,
    }
    assert truths.differing([(run, Fate.BROKEN), (other, Fate.BROKEN)], file) == [str(other)]


def test_a_row_counts_what_was_caught_and_what_was_disturbed():
    harmed = Run(PROBLEMS[0], 16, 0.01, 0, "rate x 3 for 10")
    healthy = dataclasses.replace(harmed, harm=None)
    results = [
        Result("x", harmed, Truth(Fate.BROKEN, 10.0, 90.0), (BEGIN + 4, BEGIN + 9), 89.5, 1.0),
        Result("x", harmed, Truth(Fate.BROKEN, 10.0, 90.0), (BEGIN - 2,), 10.0, 1.0),
        Result("x", harmed, Truth(Fate.RECOVERS, 90.0, 90.0), (BEGIN,), 70.0, 1.0),
        Result("x", healthy, Truth(Fate.HEALTHY, 90.0, 90.0), (1, BEGIN + 1), 90.0, 1.0),
        Result("y", harmed, Truth(Fate.BROKEN, 10.0, 90.0), (), 10.0, 1.0),
    ]
    found = row("x", results)
    assert (found.broken, found.caught, found.recovering, found.wrongly) == (2, 1, 1, 1)
    assert found.false_alarms == 2  # those of the healthy run, which begins like the harmed ones
    assert found.healthy_steps == healthy.steps
    assert (found.median_steps, found.within_a_point, found.points_lost) == (4, 1, 0.5)
    assert "| 1 of 2 (50%) | 4 | 1 of 1 (100%) |" in table([found], {Fate.BROKEN: 2, Fate.RECOVERS: 1})


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["GovernorConfig.balanced()", "z-score"])
def test_runs_that_begin_alike_are_run_once_up_to_where_they_part(name, one_thread, monkeypatch):
    forked = []
    monkeypatch.setattr(os, "fork", lambda fork=os.fork: forked.append(1) or fork())
    pytest.importorskip("sklearn")
    problem = next(p for p in PROBLEMS if p.name == "two classes")
    harms = ("NaN in a weight", "half of the labels wrong from here on", "rate x 30 for 3")
    training = [Run(problem, 64, 1e-3, 0, harm) for harm in harms]
    together = truths_of(training)
    assert together == [truth(run) for run in training]
    found = watched_training(name, training, together)
    alone = [watched(name, run, fate) for run, fate in zip(training, together, strict=True)]
    assert [dataclasses.replace(r, seconds=0.0) for r in found] == [
        dataclasses.replace(r, seconds=0.0) for r in alone
    ]
    assert any(r.alarms for r in found)
    assert len(forked) == 6


def test_a_branch_that_fails_is_an_error(one_thread):
    assert branch([lambda: 1, lambda: 2]) == [1, 2]
    with pytest.raises(RuntimeError, match="a branch of the run failed"):
        branch([lambda: 1 / 0])


def test_a_training_that_breaks_by_itself_is_no_healthy_one(monkeypatch):
    pytest.importorskip("sklearn")
    run = Run(dataclasses.replace(SHORT["digits"], steps=300), 64, 0.05, 0)
    assert truth(run).fate is Fate.HEALTHY
    wild = dataclasses.replace(run, rate=0.05)
    real = Run.step

    def step(self, learner, number, watch):
        if number == 200:
            for parameter in learner.parameters():
                parameter.data.zero_()
                parameter.requires_grad_(False)
        return torch.zeros(()) if number >= 200 else real(self, learner, number, watch)

    monkeypatch.setattr(Run, "step", step)
    assert truth(wild).fate is Fate.BROKEN


@pytest.mark.parametrize("name", [n for n in CONTESTANTS if n not in PACKAGES])
def test_everybody_catches_a_loss_that_is_no_number(name):
    pytest.importorskip("sklearn")
    run = Run(SHORT["digits"], 16, 0.05, 0, "NaN in the loss")
    found = watched(name, run, Truth(Fate.BROKEN, 0.0, 90.0))
    assert found.late[:1] == [BEGIN]
    assert found.score > 80.0
