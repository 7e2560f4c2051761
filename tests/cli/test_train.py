from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tolaria
from tolaria.cli.display import sparkline
from tolaria.cli.main import main

QUICK = ["train", "digits", "--steps", "60", "--threads", "1", "--no-plot"]


def test_run_tells_its_story_in_plain_lines(tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*QUICK, "--out", str(out), "--inject", "nan-loss@20", "--snapshot-interval", "5"]) == 0
    said = capsys.readouterr().out
    for part in ("GERMINATED", "alpha rises", "ROLLBACK to step", "at the end, test", str(out)):
        assert part in said
    assert {path.name for path in out.iterdir()} == {
        "config.json", "events.jsonl", "metrics.jsonl", "model.json", "model.safetensors", "summary.json",
    }  # fmt: skip


def test_quiet_is_one_line(tmp_path, capsys):
    assert main([*QUICK, "--out", str(tmp_path / "run"), "--quiet", "--no-grow", "--no-governor"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_json_is_the_summary(tmp_path, capsys):
    assert main([*QUICK, "--out", str(tmp_path / "run"), "--json", "--strict", "--skip-anomalous-steps"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert printed["steps"] == 60


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["digts"], "did you mean 'digits'"),
        (["digits", "--inject", "nan-los@3"], "did you mean 'nan-loss'"),
        (["digits", "--inject", "nan-loss"], "inject: expected '<kind>@<step>'"),
        (["digits", "--inject", "nan-loss@\u00b2"], "inject: expected '<kind>@<step>'"),
        (["text", "--steps", "10", "--inject", "nan-buffer@5"], "inject: expected a fault"),
        (["digits", "--inject", "nan-loss@99999"], "steps up to"),
        (["digits", "--device", "gpuu"], "cpu or cuda"),
        (["digits", "--lr", "-1"], "lr: expected a finite number above 0, got -1.0"),
        (["digits", "--lr", "nan"], "lr: expected a finite number above 0"),
        (["digits", "--blueprint", "mlp"], "expected features (B, T, C)"),
        (["digits", "--slot", "s9"], "expected one of stage0, stage1"),
        (["digits", "--steps", "0"], "steps: expected an integer >= 1"),
        (["digits", "--steps", "3", "--epochs", "2"], "expected one of them"),
        (["digits", "--host-steps", "3", "--steps", "9"], "--host-steps"),
        (["digits", "--threads", "0"], "threads: expected an integer from 1"),
        (["digits", "--snapshot-interval", "1"], "snapshot_interval"),
        (["digits", "--rng-seed", "-1"], "rng_seed"),
        (["digits", "--blend-steps", "2000000"], "blend_steps: expected at most 1000000"),
        (["digits", "--no-governor", "--strict"], "preset: expected not to come with use_governor=False"),
        (["digits", "--no-governor", "--log-only"], "log_only: expected not to come with"),
        (["digits", "--no-governor", "--skip-anomalous-steps"], "skip_anomalous_steps: expected not to come"),
        (["digits", "--no-governor", "--snapshot-interval", "9"], "snapshot_interval: expected not to come"),
        (["digits", "--data-dir", "/tmp"], "data_dir: expected None, since task 'digits' needs no files"),
        (["text", "--data-dir", "x"], "data_dir: expected None, since task 'text' needs no files"),
        (
            ["digits", "--no-grow", "--blueprint", "norm"],
            "blueprint: expected not to come with grow_seed",
        ),
        (["digits", "--no-grow", "--seed-lr", "1e-3"], "seed_lr: expected not to come with"),
        (["digits", "--no-grow", "--max-germinations", "3"], "max_germinations: expected not to come with"),
        (["cifar10", "--data-dir", "/nowhere"], "expected cifar-10-batches-py/data_batch_1 under '/nowhere'"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *arguments, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1
    assert not out.exists()


def test_overwriting_wants_to_know_what(capsys):
    assert main(["train", "--overwrite"]) == 2
    assert "--overwrite: expected to come with --out" in capsys.readouterr().err


def test_what_is_asked_for_is_not_stretched_with_the_run(tmp_path):
    out = tmp_path / "run"
    assert main([*QUICK, "--validate-every", "25", "--warmup-steps", "30", "--quiet", "--out", str(out)]) == 0
    settings = json.loads((out / "config.json").read_text())["settings"]
    assert (settings["validate_every"], settings["warmup_steps"]) == (25, 30)


def test_hosts_figures_are_not_sold_as_a_control(tmp_path, capsys):
    assert main([*QUICK, "--out", str(tmp_path / "run")]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "host alone, test" in line]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    step = summary["phases"][0]["end_step"]
    assert row.endswith(f"(at step {step} of this run; no control)")
    assert summary["host_test_step"] == step
    assert "no control" in summary["host_test_note"]


def test_folder_with_files_is_refused(tmp_path, capsys):
    (tmp_path / "mine.txt").touch()
    assert main([*QUICK, "--out", str(tmp_path)]) == 2
    assert "holds files" in capsys.readouterr().err


def test_divergence_ends_the_run_with_a_complete_folder(tmp_path, capsys):
    arguments = [*QUICK, "--out", str(tmp_path / "run"), "--max-rollbacks", "2"]
    assert main([*arguments, "--inject", "nan-loss@10", "--inject", "nan-loss@12"]) == 1
    assert "2 rollbacks within" in capsys.readouterr().err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 11  # the twelfth was undone and never finished
    assert "2 rollbacks" in summary["diverged"]


def test_ctrl_c_leaves_a_complete_folder(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "tolaria", "train", "digits", "--threads", "1", "--out", str(out)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(tolaria.__file__).parents[1]),
    }  # the package under test
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a background job
    ) as process:
        try:
            told = next((line for line in process.stdout if "validation" in line), None)  # None: it has ended
            process.send_signal(signal.SIGINT)
            _, error = process.communicate()
        finally:
            process.kill()  # and waited for, whatever happened
    assert told is not None, error
    assert process.returncode == 130, error
    assert json.loads((out / "summary.json").read_text())["interrupted"] is True
    assert (out / "run.png").stat().st_size > 10_000
    assert (out / "model.safetensors").exists()


def test_list_names_the_tasks(capsys):
    assert main(["train", "list"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} >= {"digits", "text"}


def test_sparkline_marks_what_is_not_finite():
    assert sparkline([1.0, float("nan"), 100.0]) == "▁\u00d7█"
