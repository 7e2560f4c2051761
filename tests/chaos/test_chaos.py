from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from tolaria.chaos import (
    ChaosRun,
    Collapse,
    InterruptedCapture,
    LargeBuffer,
    Outcome,
    PoisonedCapture,
    Ramp,
    chosen_faults,
    execute,
    list_chaos_faults,
    random_faults,
    run_table,
    table,
    task_run,
)
from tolaria.chaos.run import checked_start
from tolaria.cli.main import main
from tolaria.governor import GovernorConfig
from tolaria.tasks import get_task
from tolaria.train import governor_config_for

INTERVAL = 10


def make_run(**settings: object) -> ChaosRun:
    """Somebody's own model: a perceptron with batch norm that tells two clouds apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (512,), generator=generator)
    points = torch.randn(512, 4, generator=generator) + 2.0 * labels[:, None]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))

    def accuracy(trained: nn.Module) -> float:
        trained.eval()
        with torch.no_grad():
            return 100.0 * float((trained(points).argmax(1) == labels).float().mean())

    return ChaosRun(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        batches=[(points[i : i + 64], labels[i : i + 64]) for i in range(0, 512, 64)],
        criterion=nn.CrossEntropyLoss(),
        evaluate=accuracy,
        random_guess_loss=math.log(2),
        config=GovernorConfig(snapshot_interval=INTERVAL, **settings),
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", list_chaos_faults())
def test_fault_ends_as_promised(name):
    (fault,) = chosen_faults([name])
    outcome = execute(make_run(), fault, steps=90, start=43)
    assert outcome.is_finite
    if fault.detectable:
        assert outcome.is_caught, "not caught"
        assert outcome.bit_exact, "restored state differs from what was captured"
        # interval + probation + min_panics, per rollback
        assert outcome.steps_lost <= outcome.rollbacks * (INTERVAL + 2 + 2)
        assert outcome.score > 90.0


def test_undisturbed_run_is_left_alone():
    outcome = execute(make_run(), steps=80)
    assert (outcome.rollbacks, outcome.reason, outcome.bit_exact) == (0, None, None)
    assert outcome.score > 90.0


def test_rollback_to_the_state_at_attach_is_compared_with_it():
    outcome = execute(make_run(), *chosen_faults(["nan-loss"]), steps=40, start=5)
    assert (outcome.rollbacks, outcome.steps_lost) == (1, 5)
    assert outcome.is_as_promised, outcome


def test_poisoned_capture_is_never_promoted():
    outcome = execute(make_run(), PoisonedCapture(), steps=60, start=41)
    assert (outcome.start, outcome.reason, outcome.detected_after) == (50, "NON_FINITE_STATE", 0)
    assert outcome.bit_exact


def test_interrupted_capture_is_not_restored():
    outcome = execute(make_run(), InterruptedCapture(), steps=60, start=41)
    assert (outcome.start, outcome.reason) == (50, "NON_FINITE")
    assert outcome.bit_exact


@pytest.mark.parametrize("fault", random_faults(40, rng_seed=1), ids=lambda fault: fault.name)
def test_non_finite_value_anywhere_ends_healthy(fault):
    outcome = execute(make_run(), fault, steps=70, start=20 + 7 * int(fault.name.split("#")[1]) % 31)
    assert outcome.is_as_promised, outcome
    assert outcome.steps_lost <= outcome.rollbacks * (INTERVAL + 2 + 2)


def test_ramp_is_the_default_rules_blind_spot_and_strict_sees_it():
    reasons = []
    for preset in ("default", "strict"):
        config = governor_config_for(get_task("digits"), preset=preset, snapshot_interval=50)
        outcome = execute(task_run("digits", config=config), Ramp(30), steps=180, start=150)
        reasons.append(outcome.reason)
    assert reasons == [None, "ANOMALY"]


@pytest.mark.parametrize("preset", ["default", "balanced"])
def test_a_large_buffer_is_told_or_undone(preset: str) -> None:
    config = GovernorConfig.preset(preset, snapshot_interval=INTERVAL, probation=2)
    run = make_run()
    run.config = config
    outcome = execute(run, LargeBuffer(), steps=70, start=48)
    assert outcome.is_as_promised
    if preset == "default":
        assert (outcome.rollbacks, outcome.reason) == (0, "SUSPICIOUS_STATE (tolerated)")
    else:
        assert (outcome.rollbacks, outcome.reason) == (1, "SUSPICIOUS_STATE")
        assert outcome.score > 90.0


def test_settings_that_wait_need_not_roll_back_what_may_heal() -> None:
    run = make_run()
    run.config = GovernorConfig.balanced(snapshot_interval=INTERVAL, probation=2)
    outcome = execute(run, Collapse(), steps=70, start=43)
    assert outcome.is_as_promised
    assert outcome.score > 90.0


def test_table_compares_with_the_undisturbed_run():
    told = []
    table = run_table(
        make_run, faults=chosen_faults(["nan-loss", "collapse"]), steps=60, on_outcome=told.append
    )
    assert [outcome.fault for outcome in told] == ["nothing", "nan-loss", "collapse"]
    assert table.undisturbed is told[0]
    assert "2 of 2 faults rolled back" in table.summary()
    lines = str(table).splitlines()
    assert lines[0].split()[:3] == ["fault", "at", "caught"]
    assert lines[1].startswith("nan-loss")
    assert "bit-exact" in lines[1]
    assert table.is_as_promised


def test_fault_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="expected a start from 1 to 11"):
        execute(make_run(), Ramp(40), steps=50, start=30)
    with pytest.raises(ValueError, match="did you mean 'nan-buffer'"):
        chosen_faults(["nan-bufer"])


def test_command_prints_the_table(capsys, tmp_path):
    arguments = ["chaos", "--faults", "nan-loss,single-spike", "--steps", "60", "--snapshot-interval", "10"]
    assert main([*arguments, "--out", str(tmp_path / "table.json")]) == 0
    said = capsys.readouterr().out
    assert "1 of 2 faults rolled back, 1 sat through" in said
    written = json.loads((tmp_path / "table.json").read_text())
    assert [outcome["fault"] for outcome in written["outcomes"]] == ["nan-loss", "single-spike"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--faults", "nan-los"], "did you mean 'nan-loss'"),
        (["--random", "0"], "random: expected an integer >= 1"),
        (["--threads", "0"], "threads: expected an integer from 1"),
        (["--out", "no/such/folder/table.json"], "out: expected a file that can be written"),
        (["--out", "."], "out: expected a file that can be written"),
        (["--steps", "0"], "steps"),
        (["--snapshot-interval", "1"], "snapshot_interval"),
        (["digts"], "did you mean 'digits'"),
        (["--data-dir", "x"], "data_dir: expected None, since task 'digits' needs no files"),
        (["cifar10", "--data-dir", "/nowhere"], "data_batch_1 under '/nowhere'"),
        (["--steps", "30", "--faults", "ramp"], "steps: expected at least 40, since ramp lasts 40, got 30"),
        (
            ["--steps", "40", "--faults", "poisoned-capture"],
            "expected at least 50, since poisoned-capture lasts 1 and begins at",
        ),
        (
            ["--steps", "40", "--faults", "inf-buffer"],
            "expected at least 50, since inf-buffer lasts 1 and is found by",
        ),
        (
            ["--steps", "80", "--start", "51", "--faults", "nan-moment"],
            "start: expected a start from 1 to 50, since nan-moment lasts 1 of 80 steps and is found by",
        ),
        (["--start", "0", "--faults", "ramp"], "start: expected a start from 1 to 261, since ramp lasts 40"),
        (["--start", "299", "--faults", "nan-loss,ramp"], "start: expected a start from 1 to 261"),
        (["--start", "251", "--faults", "interrupted-capture"], "start: expected a start from 1 to 250"),
        (["--threads", "1000000000"], "threads: expected an integer from 1"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, capsys):
    assert main(["chaos", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1


def test_two_choices_of_faults_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["chaos", "--faults", "ramp", "--random", "3"])
    assert caught.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


class FakeRun:
    def __init__(self, interval: int) -> None:
        self.config = GovernorConfig(snapshot_interval=interval)


def outcome(fault: object) -> Outcome:
    return Outcome(
        fault="", start=1, rollbacks=0, reason=None, detected_after=None, steps_lost=0, bit_exact=None,
        is_finite=True, score=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("steps", [40, 41, 44, 45, 60, 77, 120, 300])
@pytest.mark.parametrize("interval", [10, 40])
def test_every_drawn_start_fits(steps, interval):
    for rng_seed in range(20):
        starts: list[int] = []

        def start(run, fault=None, *, steps, start=0, starts=starts):
            if fault is not None:
                starts.append(checked_start(fault, steps, run.config.snapshot_interval, start))
            return outcome(fault)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(table, "execute", start)
            faults = [f for f in chosen_faults() if f.duration + f.at_capture * (interval - 1) <= steps]
            run_table(lambda: FakeRun(interval), faults=faults, steps=steps, rng_seed=rng_seed)
        assert len(starts) == len(faults)
        assert all(1 <= first <= steps - f.duration + 1 for first, f in zip(starts, faults, strict=True))
        hidden = [first for first, f in zip(starts, faults, strict=True) if f.found_by_capture]
        assert len(hidden) == 5
        assert max(hidden) <= steps // interval * interval


def test_table_that_does_not_fit_runs_nothing():
    seen: list[object] = []
    with pytest.raises(ValueError, match="expected at least 40, since ramp lasts 40"):
        run_table(make_run, faults=[*chosen_faults(["nan-loss"]), Ramp(40)], steps=39, on_outcome=seen.append)
    assert not seen


def test_short_runs_of_every_fault_end_as_promised():
    result = run_table(make_run, steps=60)
    assert len(result.outcomes) == len(list_chaos_faults())
    assert result.undisturbed.rollbacks == 0


def test_bad_option_leaves_no_table_behind(tmp_path, capsys):
    assert main(["chaos", "--steps", "0", "--out", str(tmp_path / "table.json")]) == 2
    assert not any(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        main(["chaos", "--rng-seed", "x"])
    assert "expected an integer from 0 to 2147483647, got 'x'" in capsys.readouterr().err
