"""What somebody understands in five seconds: how the run went, what was lost, how good the network is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from tolaria.report.incidents import score_of
from tolaria.report.lines import Line, number, whole
from tolaria.report.reading import RunReading
from tolaria.report.words import count, duration, figure, percent, plain, size

_MOST_ROWS = 300


def name_of(run: RunReading) -> str:
    """What the page calls it."""
    return plain(run.path.name or run.path.resolve().name)


def verdict_of(run: RunReading, incidents: list[Line]) -> tuple[str, str]:
    """One sentence, and ``good``, ``warn``, ``bad`` or ``none`` for its colour."""
    rollbacks, anomalies = run.log.rollbacks, run.log.anomalies
    worst = {line["answer"] for line in incidents}
    if run.summary.get("diverged") is not None:
        return f"Diverged: {plain(run.summary['diverged'])}", "bad"
    if not run.steps and not run.log.counts:
        return "Nothing is recorded yet.", "none"
    said = "Healthy: nothing went wrong."
    kind = "good"
    if rollbacks:
        times = "once" if rollbacks == 1 else f"{rollbacks:,} times"
        taken = max(run.last_step, run.log.last_step, 1)
        lost = run.log.steps_lost
        again = f"{count(lost, 'step')} of training were lost ({percent(lost / taken)})"
        kind = "good" if worst <= {"no"} else "warn"
        said = f"Healed {times}{', with no lasting harm' if kind == 'good' else ''}; {again}."
    elif incidents:
        bad = count(anomalies, "bad step") if anomalies else count(len(incidents), "incident")
        said, kind = f"No rollback; {bad} told.", "good" if worst <= {"no"} else "warn"
    elif run.loss.odd:
        said, kind = (
            f"No incident is recorded, but {count(run.loss.odd, 'loss was', 'losses were')} not finite.",
            "bad",
        )
    elif run.config.get("governor") is None and not run.log.counts["attach"]:
        said, kind = "Nobody watched this run: no incident is recorded.", "none"
    if "yes" in worst:
        said, kind = f"{said} Not everything came back to where it had been.", "warn"
    if run.summary.get("interrupted"):
        return f"{said} The run was interrupted.", "warn"
    if not run.summary and run.config:
        return f"{said} No end is recorded: it is going on, or was killed.", kind
    return said, kind


def tiles(run: RunReading) -> list[Line]:
    """Figures with a label and a note."""
    found = [_tile("Steps", f"{max(run.last_step, run.log.last_step):,}", _length(run))]
    lost = run.log.steps_lost
    share = lost / max(run.last_step, run.log.last_step, 1)
    captures = run.log.counts["promotion"]
    if run.config.get("governor") or run.log.counts:
        rollbacks = count(run.log.rollbacks, "rollback")
        note = f"{count(lost, 'step')}, {rollbacks}"
        found.append(_tile("Training lost", percent(share) if lost else "nothing", note))
        made = count(run.log.counts["capture"], "capture")
        found.append(_tile("Known good states", f"{captures:,}", f"of {made}"))
    found += _scores(run)
    if run.steps:
        found.append(_tile("Last loss", figure(run.last_loss), f"at step {run.last_step:,}"))
    return found


def _tile(label: str, value: str, note: str) -> Line:
    return {"label": label, "value": value, "note": note}


def _length(run: RunReading) -> str:
    total, seconds = whole(run.config.get("total_steps")), number(run.summary.get("seconds"))
    said = [f"of {total:,}"] if total else []
    first, last = run.log.first_time, run.log.last_time
    if seconds is not None:
        said.append(f"in {duration(seconds)}")
    elif first is not None and last is not None and last > first:
        said.append(f"in {duration(last - first)}")
    return " ".join(said)


def _scores(run: RunReading) -> Iterator[Line]:
    """How good it is at the end, and what the record knows of how good it would be without the seed."""
    test, host = run.summary.get("test"), run.summary.get("host_test")
    value = number(test.get("val_accuracy")) if isinstance(test, dict) else None
    if value is not None and not math.isnan(value):
        label = "Test accuracy, with the seed" if host else "Test accuracy"
        yield _tile(label, f"{value:.2f}%", "at the end")
        alone = number(host.get("val_accuracy")) if isinstance(host, dict) else None
        if alone is not None:
            step = whole(run.summary.get("host_test_step"))
            note = f"at step {step or 0:,} of this run: no control, see a comparison for that"
            yield _tile("Before there was a seed", f"{alone:.2f}%", note)
        return
    score = score_of(run)
    known = [(s, f[score.name]) for s, f in run.validations if score and score.name in f]
    if score is not None and known:
        unit = "%" if score.is_accuracy else ""
        yield _tile(plain(score.name), f"{figure(known[-1][1])}{unit}", f"at step {known[-1][0]:,}")


def judge_note(run: RunReading) -> str:
    """Whether what is drawn is what the judge thought."""
    if run.judge is None or not run.judge.judged:
        return ""
    judge = run.judge
    said = f"Recomputed offline from {count(judge.judged, 'recorded loss', 'recorded losses')}"
    if judge.different:
        where = ", ".join(f"{step:,}" for step in judge.differed[:5])
        return (
            f"{said}. {judge.different} verdicts come out otherwise than recorded (steps {where}): there the "
            "curves are near what the judge went by, not the same."
        )
    if not judge.agreed:
        return f"{said}; there is no recorded verdict to check it against."
    return f"{said}; all {judge.agreed} recorded verdicts come out the same, to the bit."


def settings(run: RunReading) -> list[list[str]]:
    """Configuration and versions, flat: name and value."""
    rows = [[plain(name), plain(value)] for name, value in flat(run.config)]
    if run.log.attach is not None and (bytes_ := number(run.log.attach.get("slot_bytes"))) is not None:
        rows.append(["governor's memory for two states", size(bytes_)])
    return rows[:_MOST_ROWS]


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Names with dots, and plain values."""
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield f"{prefix}{name}", ", ".join(map(str, value)) or "none"
        else:
            yield f"{prefix}{name}", "none" if value is None else value
