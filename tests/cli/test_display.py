from __future__ import annotations

import io

import tolaria.cli.display as display_module
from tolaria.cli.display import PlainDisplay, QuietDisplay, RichDisplay, choose_display
from tolaria.runs import run_task


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_display_fits_the_stream():
    assert isinstance(choose_display(quiet=False, stream=Terminal()), RichDisplay)
    assert isinstance(choose_display(quiet=False, stream=io.StringIO()), PlainDisplay)
    assert type(choose_display(quiet=True, stream=Terminal())) is QuietDisplay


def test_live_display_shows_seed_and_rollback(tmp_path, monkeypatch):
    monkeypatch.setattr(display_module, "_REFRESH_S", 0.0)
    stream = Terminal()
    display = RichDisplay(stream)
    run_task(
        "digits", out=tmp_path / "run", plot=False, steps=60, threads=1, inject=["nan-loss@20"],
        governor_options={"snapshot_interval": 5}, observers=[display],
    )  # fmt: skip
    said = stream.getvalue()
    for part in ("tolaria train digits", "alpha", "ROLLBACK to step", "seed germinated", "known good"):
        assert part in said
    names = [name for name, _ in display.rows()]
    alone = ["host alone, test", "host alone to the end, test"]
    assert names == [*alone, "at the end, test", "seed", "parameters", "governor", "steps"]
    assert dict(display.rows())[alone[1]].endswith("(a control: the same steps)")
    assert "1 rollback," in dict(display.rows())["governor"]
    assert dict(display.rows())["host alone, test"].endswith("of this run; no control)")
