"""What went wrong in a run and what was done about it, for the picture and for the page."""

from __future__ import annotations

from dataclasses import dataclass

from tolaria.runs.record import Line, RunRecord


@dataclass(slots=True)
class Incident:
    """What went wrong and what was done about it: one label in the governor's lane."""

    first: float
    """The leftmost step that it marks."""
    last: float
    """The rightmost one."""
    text: str
    faults: list[float]
    """Where something was broken on purpose."""
    anomalies: list[float]
    """Verdicts that were sat through."""
    rollback: Line | None = None
    row: int = 0


def find_incidents(run: RunRecord) -> list[Incident]:
    """Faults, anomalies and rollbacks, put together where one led to the other; oldest first."""
    found: list[Incident] = []
    waiting: list[Incident] = []  # faults that nothing has answered yet
    happened = [(fault["step"], 0, fault) for fault in run.events.get("fault", ())]
    happened += [(verdict["step"], 1, verdict) for verdict in run.anomalies]
    happened += [(report["step"], 2, report) for report in run.rollbacks]
    for step, kind, line in sorted(happened, key=lambda item: item[:2]):
        at = float(step)
        if kind == 0:
            waiting.append(Incident(at, at, str(line["name"]).partition("@")[0], [at], []))
            found.append(waiting[-1])
            continue
        behind = [i for i in waiting if kind == 1 or i.faults[0] > line["restored_step"]]
        incident = behind[-1] if behind else None
        if incident is None and found and found[-1].rollback is None and found[-1].anomalies:
            incident = found[-1]  # one anomaly after another
        if incident is None:
            incident = Incident(at, at, "", [], [])
            found.append(incident)
        if kind == 1:
            incident.anomalies.append(at)
        else:
            incident.rollback = line
            incident.first = min(incident.first, float(line["restored_step"]))
            waiting = [i for i in waiting if i not in behind]
        incident.last = max(incident.last, at)
    for incident in found:
        incident.text = _words(incident)
    return found


def _words(incident: Incident) -> str:
    report = incident.rollback
    said = [f"{incident.text} injected"] if incident.text else []
    if report is not None:
        reason = str(report["reason"]).replace("_", " ").lower()
        lost = report["steps_lost"]
        said.append(
            f"{reason}: back to {report['restored_step']}, {lost} step{'s' if lost != 1 else ''} lost"
        )
    elif incident.anomalies:
        many = len(incident.anomalies)
        said.append(f"{many} anomalies sat through" if many > 1 else "anomaly sat through")
    else:
        said.append("unnoticed")
    return " \N{RIGHTWARDS ARROW} ".join(said)
