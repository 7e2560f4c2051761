"""``tolaria report``: what the page says in words, and where it is written."""

import json
import re

import pytest

from tolaria.cli.main import main
from tolaria.report import RunReading, write_report
from tolaria.report.compare import compare
from tolaria.report.incidents import tell
from tolaria.report.overview import verdict_of
from tolaria.report.page import as_script, data_of
from tolaria.report.words import figure, plain


def read(path):
    run = RunReading(path)
    run.refresh()
    return run


def data_in(page):
    text = page.read_text(encoding="utf-8")
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    )


def test_the_command_writes_one_page(digits, tmp_path, capsys):
    pytest.importorskip("plotly")
    page = tmp_path / "page.html"
    assert main(["report", str(digits), "--out", str(page)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text(encoding="utf-8")
    assert text.count("plotly.js v") >= 1
    assert not re.search(r'(?:src|href)="(?:https?:)?//', text.split("<script", 1)[0])
    assert page.stat().st_size < 8e6
    assert main(["report", str(digits), "--out", str(page)]) == 0  # its own it writes over


def test_what_happened_what_was_lost_whether_it_mattered(digits):
    run = read(digits)
    first, second, third = tell(run)
    assert (
        "at step 120: nan-loss, the loss was made NaN. The loss was NaN at step 120; usual was"
        in first["what"]
    )
    assert "(capture 3)" in first["what"]
    assert first["lost"] == "20 steps of training, 5.0% of the run."
    assert re.search(r"NaN or infinity was found in host\.\S*running_mean", second["what"])
    assert "20 steps after the fault" in second["what"]
    assert "The loss was 1," in third["what"]
    assert "after 2 bad verdicts" in third["what"]
    for incident in (first, second, third):
        assert re.match(
            r"No lasting harm: the loss was back at its former level \(below [\d.]+\) \d+ steps later",
            incident["mattered"],
        )
        assert incident["answer"] == "no"
    lost = sum(event["report"]["steps_lost"] for event in run.log.incidents if event["kind"] == "rollback")
    assert verdict_of(run, tell(run)) == (
        f"Healed 3 times, with no lasting harm; {lost} steps of training were lost ({lost / 4:.1f}%).",
        "good",
    )


def rollback(step, to, mean=1.0, reason="ANOMALY"):
    verdict = {
        "kind": "verdict",
        "step": step,
        "reason": reason,
        "rollback": True,
        "loss": 50.0,
        "mean": mean,
        "std": 0.1,
        "thresholds": [10, 2, 3],
    }
    report = {**verdict, "restored_step": to, "restored_capture": 2, "steps_lost": step - to, "reward": -10}
    return [verdict, {"kind": "rollback", "step": step, "report": report}]


def test_it_mattered_where_the_loss_does_not_come_back(make_run):
    lines = [{"kind": "step", "step": s, "loss": 1.0 if s < 50 else 5.0} for s in range(1, 200)]
    run = read(make_run(metrics=lines, events=rollback(50, 40)))
    (incident,) = tell(run)
    assert incident["mattered"] == "Yes: the loss is not back below 1.20, 149 steps later."
    assert verdict_of(run, [incident])[1] == "warn"


def test_it_is_too_early_to_tell(make_run):
    lines = [{"kind": "step", "step": s, "loss": 1.0 if s < 50 else 5.0} for s in range(1, 60)]
    (incident,) = tell(read(make_run(metrics=lines, events=rollback(50, 40))))
    assert incident["mattered"] == "Too early to tell: the record ends 9 steps later."
    assert incident["answer"] == "open"


def test_a_rollback_that_leads_to_the_next_one(make_run):
    lines = [{"kind": "step", "step": s, "loss": 1.0 if s < 50 else 5.0} for s in range(1, 200)]
    first, second = tell(read(make_run(metrics=lines, events=[*rollback(50, 40), *rollback(60, 40)])))
    assert first["mattered"] == "It led to the next rollback, at step 60."
    assert "restore 2 of this capture" in dict(second["details"])["Tried"]


def test_a_network_that_came_back_worse(make_run):
    lines = [{"kind": "step", "step": s, "loss": 1.0} for s in range(1, 100)]
    lines += [{"kind": "validation", "step": s, "val_accuracy": 90.0 if s < 50 else 80.0} for s in (30, 90)]
    (incident,) = tell(read(make_run(metrics=lines, events=rollback(50, 40))))
    assert incident["answer"] == "a little"
    assert "validation accuracy 90.0% (step 30) before, 80.0% (step 90) after" in incident["mattered"]


def test_nothing_went_wrong(make_run):
    run = read(
        make_run(
            metrics=[{"kind": "step", "step": s, "loss": 1.0} for s in range(1, 30)],
            config={"governor": {}},
            summary={"steps": 29},
        )
    )
    assert verdict_of(run, tell(run)) == ("Healthy: nothing went wrong.", "good")


def test_a_run_that_nobody_watched_is_not_called_healthy(make_run):
    run = read(make_run(metrics=[{"kind": "step", "step": s, "loss": "nan"} for s in range(1, 30)]))
    assert verdict_of(run, tell(run)) == ("No incident is recorded, but 29 losses were not finite.", "bad")
    run = read(make_run(metrics=[{"kind": "step", "step": 1, "loss": 1.0}], name="other"))
    assert verdict_of(run, tell(run)) == ("Nobody watched this run: no incident is recorded.", "none")


@pytest.mark.parametrize("out", ["a folder", "another file", "no folder"])
def test_only_a_page_is_written_over(digits, tmp_path, capsys, out):
    target = {
        "a folder": tmp_path,
        "another file": tmp_path / "thesis.html",
        "no folder": tmp_path / "no" / "page.html",
    }[out]
    (tmp_path / "thesis.html").write_text("years of work")
    assert main(["report", str(digits), "--out", str(target)]) == 2
    assert "out: expected a" in capsys.readouterr().err
    assert (tmp_path / "thesis.html").read_text() == "years of work"


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path / "gone")]) == 2
    assert "RUN: expected a run folder or a .jsonl file" in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected 1 to 64 runs, got 0"):
        write_report([])


def test_same_seeds_are_paired(make_run):
    runs = []
    for seed in range(3):
        for kind, gain in (("host", 0.0), ("grown", 1.0 + seed / 10)):
            config = {"task": "digits", "rng_seed": seed, "settings": {"kind": kind}}
            runs.append(read(make_run(
                metrics=[{"kind": "step", "step": 1, "loss": 1.0}], config=config, name=f"{kind}-{seed}",
                summary={"steps": 1, "test": {"val_accuracy": 90.0 + seed + gain}},
            )))  # fmt: skip
    found = compare(runs, [run.folder.name for run in runs])
    (said,) = found["pairs"]
    assert said.startswith(
        "grown-0 against host-0 (they differ in settings.kind): test accuracy (%) +1.1 over 3 seeds in pairs"
    )
    assert "standard error 0.058; ahead in 3, behind in 0." in said
    assert [row[0] for row in found["differences"]["rows"]] == ["rng_seed", "settings.kind"]


def test_links_lead_to_the_files_from_wherever_the_page_is(digits, tmp_path):
    links = dict(data_of([read(digits)], tmp_path)["runs"][0]["links"])
    assert (tmp_path / links["metrics.jsonl"]).resolve() == (digits / "metrics.jsonl").resolve()


@pytest.mark.parametrize("text", ["</script>", "<!--", "]]>", "&amp;", "\u2028", "\ud800", "\x00", "é"])
def test_json_in_a_script_is_inert(text):
    written = as_script({"a": text})
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written) == {"a": text}


@pytest.mark.parametrize(
    ("value", "words"),
    [("a\u202eb", "a[U+202E Right-To-LeftOverride]b"), ("\x1b[31m", "[U+001B][31m"), ("\ud800", "[U+D800]"),
     (None, "None"), ("naïve 模型", "naïve 模型")],
)  # fmt: skip
def test_plain(value, words):
    assert plain(value) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.0, "0.00"), (float("nan"), "NaN"), (float("-inf"), "minus infinity"),
     (1234.5, "1,234"), (0.00123, "0.00123"), (1e9, "1.00e+09"), (None, "unknown")],
)  # fmt: skip
def test_figure(value, words):
    assert figure(value) == words
