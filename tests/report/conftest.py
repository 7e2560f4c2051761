import json

import pytest

from tolaria.runs import run_task

LENGTH = 400
FAULTS = ("nan-loss@120", "nan-buffer@246", "spike@320")


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A run of digits with three faults that were injected on purpose; not to be changed."""
    pytest.importorskip("sklearn")
    out = tmp_path_factory.mktemp("runs") / "digits"
    run_task(
        "digits", out=out, steps=LENGTH, threads=1, inject=FAULTS, plot=False,
        governor_options={"snapshot_interval": 50}, validate_every=40,
    )  # fmt: skip
    return out


@pytest.fixture
def make_run(tmp_path):
    """Makes a run folder of what is given."""

    def make(*, metrics=(), events=(), name="run", **files):
        folder = tmp_path / name
        folder.mkdir()
        for file, lines in (("metrics.jsonl", metrics), ("events.jsonl", events)):
            (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
        for file, value in files.items():
            (folder / f"{file}.json").write_text(json.dumps(value))
        return folder

    return make


def step(number, loss, **more):
    return {"kind": "step", "step": number, "loss": loss, **more}
