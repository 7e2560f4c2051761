"""Each incident in sentences: what happened, what was lost, whether it mattered."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tolaria.report.lines import Line, number, whole
from tolaria.report.reading import RunReading
from tolaria.report.words import count, figure, percent, plain
from tolaria.runs.incidents import Incident, find_incidents
from tolaria.runs.record import RunRecord

_PAIRED = ("fault", "verdict", "rollback")
_TOLD = "SUSPICIOUS_STATE"
_ONE_POINT = 1.0
_FAULTS = {
    "nan-loss": "the loss was made NaN",
    "spike": "the loss, and with it the gradient, was made a thousand times larger",
    "nan-weight": "NaN was put into a weight",
    "nan-buffer": "NaN was put into a buffer, such as a running mean",
    "nan-gradient": "NaN was put into a gradient",
    "lobotomy": "the last layer was set to zero, so that the network forgets",
}
"""What those of :mod:`tolaria.train` do."""


@dataclass(frozen=True, slots=True)
class Score:
    """Which validated figure says how good the network is."""

    name: str
    """As the record calls it."""
    is_accuracy: bool
    """In per cent, the higher the better; else a loss."""

    def words(self, at: tuple[int, float]) -> str:
        """A value and its step."""
        return f"{figure(at[1])}{'%' if self.is_accuracy else ''} (step {at[0]:,})"


def score_of(run: RunReading) -> Score | None:
    """The accuracy, else the loss, that the run validated."""
    names = list(dict.fromkeys(name for _, figures in run.validations for name in figures))
    for is_accuracy, wanted in ((True, "accuracy"), (False, "loss")):
        for name in [f"val_{wanted}", *[n for n in names if wanted in n and not n.startswith("train")]]:
            if name in names:
                return Score(name, is_accuracy)
    return None


def tell(run: RunReading) -> list[Line]:
    """Every incident, oldest first, as the page shows it."""
    groups: dict[tuple[str, int], dict[str, list[Line]]] = {}
    alone: list[Line] = []
    for event in run.log.incidents:
        is_told = event["kind"] == "verdict" and event["reason"] == _TOLD and not event["rollback"]
        if is_told or event["kind"] not in _PAIRED:
            alone.append(event)
            continue
        whose = (str(event.get("governor") or ""), whole(event.get("row")) or 0)
        groups.setdefault(whose, {}).setdefault(event["kind"], []).append(event)
    faults = groups.get(("", 0), {}).get("fault", [])
    if (
        faults and len(groups) == 2 and set(groups[("", 0)]) == {"fault"}
    ):  # of the one governor, which has a name
        (named,) = (kinds for whose, kinds in groups.items() if whose != ("", 0))
        named["fault"] = faults
        del groups[("", 0)]
    found = []
    for whose, kinds in groups.items():
        nothing = np.zeros(0)
        record = RunRecord(nothing, nothing, nothing, [], events=kinds)
        teller = _Teller(run, kinds, ", ".join(filter(None, (plain(whose[0]), f"row {whose[1]}"))))
        found += [teller.tell(incident) for incident in find_incidents(record)]
    found += [_single(event) for event in alone]
    found.sort(key=lambda line: (line["step"], line["first"]))
    for at, line in enumerate(found, 1):
        line["id"] = at
    return found


class _Teller:
    """Tells the incidents of one governor."""

    def __init__(self, run: RunReading, events: dict[str, list[Line]], whose: str) -> None:
        self._run, self._score, self._whose = run, score_of(run), whose
        self._verdicts = {event["step"]: event for event in events.get("verdict", ())}
        self._reports = [event["report"] for event in events.get("rollback", ())]
        self._undone = [(report["restored_step"], report["step"]) for report in self._reports]
        self._several = len({(e.get("governor"), e.get("row")) for e in run.log.incidents}) > 2

    def tell(self, incident: Incident) -> Line:
        """One."""
        report = incident.rollback
        steps = [int(each) for each in incident.anomalies] + ([report["step"]] if report is not None else [])
        verdict = next((self._verdicts[s] for s in sorted(steps) if s in self._verdicts), report)
        if report is not None:
            outcome = "rolled back"
        else:
            outcome = "sat through" if incident.anomalies else "unnoticed"
        start = int(min([*incident.faults, *steps]))
        fault = plain(incident.text.partition(" injected")[0]) if incident.faults else ""
        reason = "" if verdict is None else plain(verdict["reason"])
        mattered, answer = self._mattered(start, report, steps)
        name = fault or reason.replace("_", " ").lower()
        return {
            "step": start, "end": int(max([*incident.faults, *steps])), "first": int(incident.first),
            "outcome": outcome, "title": name, "reason": reason,
            "what": " ".join(self._what(incident, fault, verdict, report)),
            "lost": self._lost(report), "mattered": mattered, "answer": answer,
            "details": self._details(verdict, report),
        }  # fmt: skip

    def _what(self, incident: Incident, fault: str, verdict: Line | None, report: Line | None) -> list[str]:
        said = []
        if incident.faults:
            done = f"{fault}, {_FAULTS[fault]}" if fault in _FAULTS else fault
            said.append(f"A fault was injected on purpose at step {int(incident.faults[0]):,}: {done}.")
        if verdict is None:
            whom = "The governor noticed nothing." if self._run.config.get("governor") else "Nobody watched."
            return [*said, whom]
        said.append(_found(verdict))
        many = len(incident.anomalies) + (report is not None)
        if report is None:
            bad = "One bad step alone is" if many == 1 else f"{many} bad steps are"
            return [*said, f"{bad} not yet a reason to go back: nothing was done."]
        if report["step"] > verdict["step"]:
            said.append(
                f"At step {report['step']:,}, after {count(many, 'bad verdict')}, the governor had enough."
            )
        wait = report["step"] - int(incident.faults[0]) if incident.faults else 0
        if wait and report["step"] == verdict["step"]:
            said.append(f"That was {count(wait, 'step')} after the fault.")
        said.append(
            f"The governor put back model and optimizer as they were at step {report['restored_step']:,} "
            f"(capture {report['restored_capture']})."
        )
        return said

    def _lost(self, report: Line | None) -> str:
        if report is None:
            return "Nothing was taken back."
        lost, taken = report["steps_lost"], max(self._run.last_step, report["step"], 1)
        return f"{count(lost, 'step')} of training, {percent(lost / taken)} of the run."

    def _mattered(self, start: int, report: Line | None, steps: list[int]) -> tuple[str, str]:
        """A sentence, and a word: ``no``, ``a little``, ``yes``, ``open``."""
        run, at = self._run, report["step"] if report is not None else max([start, *steps])
        way = run.aftermath.returns.get(at) or run.aftermath.returns.get(start)
        if way is None:
            if not run.steps:
                return "The record holds no losses, so the page cannot tell.", "open"
            return "The record does not tell where the loss had been before.", "open"
        level = figure(way.level)
        if way.back_after is None:
            later = next((r["step"] for r in self._reports if r["step"] > at), None)
            if later is not None:
                return f"It led to the next rollback, at step {later:,}.", "yes"
            if way.seen < 2 * 20:
                return f"Too early to tell: the record ends {count(way.seen, 'step')} later.", "open"
            return f"Yes: the loss is not back below {level}, {count(way.seen, 'step')} later.", "yes"
        said = [
            f"The loss was back at its former level (below {level}) {count(way.back_after, 'step')} later"
        ]
        change = self._change(start, at + way.back_after, said)
        if (
            change is not None
            and change < -_ONE_POINT
            and self._score is not None
            and self._score.is_accuracy
        ):
            return "A little: " + "; ".join(said) + ".", "a little"
        return "No lasting harm: " + "; ".join(said)[0].lower() + "; ".join(said)[1:] + ".", "no"

    def _change(self, before: int, after: int, said: list[str]) -> float | None:
        score = self._score
        if score is None:
            return None
        known = [(s, f[score.name]) for s, f in self._run.validations if score.name in f]
        kept = [(s, v) for s, v in known if not any(low < s < high for low, high in self._undone)]
        then = next((each for each in reversed(kept) if each[0] < before), None)
        now = next((each for each in kept if each[0] >= after), None)
        if then is None or now is None:
            return None
        what = "validation accuracy" if score.is_accuracy else plain(score.name)
        said.append(f"{what} {score.words(then)} before, {score.words(now)} after")
        return float(now[1] - then[1])

    def _details(self, verdict: Line | None, report: Line | None) -> list[list[str]]:
        rows: list[list[str]] = [["Governor", self._whose]] if self._several else []
        if verdict is not None:
            rows += _judged(verdict)
        if report is None:
            return rows
        rows.append(
            ["Capture restored", f"{report['restored_capture']}, of step {report['restored_step']:,}"]
        )
        rows.append(["Steps lost", f"{report['steps_lost']:,}"])
        rows.append(["Reward", figure(number(report.get("reward")))])
        return [*rows, ["Tried", "; ".join(self._tried(report))]]

    def _tried(self, report: Line) -> list[str]:
        """The rungs of the ladder up to this rollback."""
        config: dict[str, Any] = self._run.config.get("governor") or {}
        again = 0
        for each in self._reports:
            if each["step"] <= report["step"]:
                again = again + 1 if each["restored_capture"] == report["restored_capture"] else 0
        most = whole(config.get("max_restores_of_one_capture"))
        said = [f"restore {max(1, again)} of this capture" + (f" (at most {most})" if most else "")]
        factor = number(config.get("lr_factor"))
        if factor is not None and factor != 1:
            said.append(f"learning rate times {figure(factor)}")
        if whole(config.get("skip_batches")):
            said.append(f"the next {count(int(config['skip_batches']), 'batch', 'batches')} left out")
        if whole(config.get("cooldown")):
            said.append(f"the next {count(int(config['cooldown']), 'loss', 'losses')} not judged")
        return said


def _found(verdict: Line) -> str:
    """What the judge found."""
    step, loss, reason = f"{verdict['step']:,}", figure(verdict["loss"]), verdict["reason"]
    usual = "" if math.isnan(verdict["mean"]) else f"; usual was {_usual(verdict)}"
    tensor = "a tensor" if verdict["tensor_name"] is None else plain(verdict["tensor_name"])
    absolute, statistical, multiplier = map(figure, verdict["thresholds"])
    return {
        "NON_FINITE": f"The loss was {loss} at step {step}{usual}.",
        "LOBOTOMY": f"The loss fell back to that of guessing, {loss}, at step {step}{usual}.",
        "ANOMALY": f"The loss was {loss} at step {step}{usual} (thresholds {absolute}, {statistical}, "
        f"{multiplier}).",
        "NON_FINITE_STATE": f"At step {step} NaN or infinity was found in {tensor}; the loss, {loss}, did "
        "not have to show it.",
        "GRADIENT_NORM": f"The gradient's norm was {figure(verdict['gradient_norm'])} at step {step}, with a "
        f"threshold of {figure(verdict['gradient_threshold'])}.",
        "DRIFT": f"By step {step} the losses had stayed above their level too long (loss {loss}{usual}).",
        "SUSPICIOUS_STATE": f"At step {step} a value far larger than ever before was found in {tensor}.",
        "MANUAL": f"At step {step} the loop asked for a rollback itself.",
        "VALIDATION": f"By step {step} what is validated had collapsed.",
    }.get(reason, f"{plain(reason)} at step {step}.")


def _usual(verdict: Line) -> str:
    return f"{figure(verdict['mean'])} \N{PLUS-MINUS SIGN} {figure(verdict['std'], 2)}"


def _judged(verdict: Line) -> list[list[str]]:
    """A verdict, field by field."""
    rows = [["Reason", plain(verdict["reason"])], ["Loss", figure(verdict["loss"])]]
    if not math.isnan(verdict["mean"]):
        rows.append(["Mean and deviation before", _usual(verdict)])
    three = " / ".join(map(figure, verdict["thresholds"]))
    rows.append(["Thresholds (absolute / statistical / multiplier)", three])
    if not math.isnan(verdict["gradient_norm"]):
        norms = f"{figure(verdict['gradient_norm'])}, threshold {figure(verdict['gradient_threshold'])}"
        rows.append(["Gradient norm", norms])
    if verdict["tensor_name"] is not None:
        rows.append(["First bad tensor", plain(verdict["tensor_name"])])
    if verdict.get("tag") is not None:
        rows.append(["Tag", plain(verdict["tag"])])
    return rows


def _single(event: Line) -> Line:
    """An event that stands for itself."""
    kind, step, told = event["kind"], event["step"], "told"
    details: list[list[str]] = []
    if kind == "verdict":
        title, details = _TOLD.replace("_", " ").lower(), _judged(event)
        what = _found(event) + " The capture that held it was not promoted; the run went on."
    elif kind == "validation":
        title, bad = "bad validation", whole(event.get("bad_in_a_row")) or 0
        what = f"The validated metric was {figure(number(event.get('metric')))} at step {step:,}"
        bound = number(event.get("bound"))
        what += "." if bound is None else f", on the wrong side of {figure(bound)}."
        details = [["Bad in a row", str(bad)]]
    elif kind == "seedculled":
        title = "seed removed"
        what = f"Seed {plain(event.get('name'))} was not finite while it learnt in isolation; it was removed."
    elif kind == "acceptance":
        title = "accepted"
        what = f"The large values of {plain(event.get('tensor_name'))} lasted: they are trusted from here on."
    elif kind == "resume":
        title, what = "resumed", f"The run went on from a saved state of step {step:,}."
    else:
        title, what = (
            "events lost",
            f"{whole(event.get('dropped')) or 'Some'} events were lost; nobody polled.",
        )
    return {
        "step": step, "end": step, "first": step, "outcome": told, "title": title,
        "reason": plain(event.get("reason") or ""), "what": what, "lost": "Nothing was taken back.",
        "mattered": "It stands here for the record.", "answer": "no", "details": details,
    }  # fmt: skip
