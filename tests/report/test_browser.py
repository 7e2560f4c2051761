"""The page as a person meets it, in a headless Chromium."""

import json
import re
import threading
import time

import pytest
from report_page import PROGRAM, chromium

from tolaria.report import write_report

pytest.importorskip("plotly")
pytest.importorskip("websocket", reason="needs websocket-client")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture(scope="module")
def report(digits, tmp_path_factory):
    return write_report([digits], tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def opened(page, report):
    page.errors.clear()
    page.requests.clear()
    page.look()
    page.send(
        "Network.emulateNetworkConditions",
        offline=True,
        latency=0,
        downloadThroughput=-1,
        uploadThroughput=-1,
    )
    page.open(report.as_uri())
    page.until("document.querySelectorAll('#plot-loss .scatterlayer .trace').length > 2")
    yield page
    assert page.errors == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:", "blob:"))] == []


def place_of(page, plot, step, height):
    """Where a step is on the screen, at a share of a chart's height from below."""
    page.js(f"document.getElementById('{plot}').scrollIntoView({{block: 'center', behavior: 'instant'}})")
    return page.js(
        f"(() => {{ const g = get('{plot}'), b = g.getBoundingClientRect(), x = g._fullLayout.xaxis, "
        f"y = g._fullLayout.yaxis; return [b.left + x._offset + x.d2p({step}), "
        f"b.top + y._offset + y._length * {1 - height}]; }})()"
    )


def point_at(page, plot, step, height):
    """Put the mouse on a place of a chart."""
    x, y = place_of(page, plot, step, height)
    page.mouse("mouseMoved", x - 3, y - 3)
    page.mouse("mouseMoved", x, y)
    page.until(f"document.querySelectorAll('#{plot} .hoverlayer text').length > 0")
    return x, y


def test_a_stranger_reads_what_happened(opened):
    cards = opened.js("[...document.querySelectorAll('.card')].map(e => e.innerText)")
    assert len(cards) == 3
    told = (("120: nan-loss", "NaN"), ("246: nan-buffer", "running_mean"), ("320: spike", "1,0"))
    for text, (fault, found) in zip(cards, told, strict=True):
        assert f"injected on purpose at step {fault}" in text
        assert found in text
        assert re.search(r"put back model and optimizer as they were at step \d+", text)
        assert re.search(r"\d+ steps? of training, [\d.]+% of the run", text)
        assert re.search(r"Did it matter\?\s*(No lasting harm|A little|Yes|Too early|It led)", text)
    assert "Healed 3 times" in opened.js("document.getElementById('verdict').textContent")


INCIDENTS = 0.7 / 3.4  # height of their row


def test_hover_tells_what_the_governor_thought(opened):
    point_at(opened, "plot-lane", 120, INCIDENTS)
    said = opened.js("document.getElementById('peek').innerText")
    for words in (
        "nan-loss, rolled back",
        "Thresholds",
        "Capture restored",
        "Steps lost",
        "-10.0",
        "restore 1",
    ):
        assert words in said, said
    point_at(opened, "plot-loss", opened.js("current().incidents[1].end"), 0.5)
    opened.until("document.getElementById('peek').innerText.includes('running_mean')")
    point_at(opened, "plot-loss", 60, 0.5)
    opened.until("document.getElementById('peek').hidden")
    said = opened.js("document.querySelector('#plot-loss .hoverlayer').textContent")
    assert "step 60" in said
    assert "smoothed" in said


def test_a_click_leads_to_the_table(opened):
    x, y = point_at(opened, "plot-lane", 120, INCIDENTS)
    for kind in ("mousePressed", "mouseReleased"):
        opened.mouse(kind, x, y, button="left", clickCount=1)
    opened.until("location.hash === '#incident-1'")
    assert opened.js("document.activeElement.id") == "incident-1"


def test_filters(opened):
    count = "document.querySelectorAll('.card').length"
    opened.js("get('find').focus()")
    opened.send("Input.insertText", text="running_mean")
    opened.until(f"{count} === 1")
    assert opened.js("document.getElementById('shown').textContent") == "1 of 3 incidents"
    opened.js("get('find').value = '', get('find').dispatchEvent(new Event('input'))")
    opened.until(f"{count} === 3")
    opened.js("outcome.value = 'rolled back', outcome.dispatchEvent(new Event('change'))")
    assert opened.js(count) == 3


def ranges(page):
    return page.js(
        "[...graphs.values()].filter(g => g.drawn).map(g => g.element._fullLayout.xaxis.range.join())"
    )


def test_a_drag_zooms_all_curves_and_a_double_click_shows_all(opened):
    (x1, y1), (x2, _) = place_of(opened, "plot-loss", 100, 0.5), place_of(opened, "plot-loss", 200, 0.5)
    opened.mouse("mouseMoved", x1, y1)
    opened.mouse("mousePressed", x1, y1, button="left", clickCount=1)
    for share in (0.3, 0.7, 1.0):
        opened.mouse("mouseMoved", x1 + share * (x2 - x1), y1, button="left", buttons=1)
    opened.mouse("mouseReleased", x2, y1, button="left", clickCount=1)
    opened.until("ui.range !== null")
    low, high = opened.js("ui.range")
    assert 95 < low < 105
    assert 195 < high < 205
    assert len(set(ranges(opened))) == 1
    for count in (1, 2):
        for kind in ("mousePressed", "mouseReleased"):
            opened.mouse(kind, x1 + 50, y1, button="left", clickCount=count)
    opened.until("ui.range === null")


def test_the_keyboard_does_what_the_mouse_does(opened):
    opened.js("document.activeElement.blur(), scrollTo(0, 0)")
    seen = []
    for _ in range(40):
        opened.press("Tab", windowsVirtualKeyCode=9)
        seen.append(opened.js("(e => e.id || e.dataset.do || e.tagName)(document.activeElement)"))
        if seen[-1] == "plot-loss":
            break
    assert {"theme", "log", "in", "csv", "plot-loss"} <= set(seen)
    opened.press("+", text="+")
    low, high = opened.js("ui.range")
    assert high - low == pytest.approx(200, abs=1)
    opened.press("ArrowRight", windowsVirtualKeyCode=39)
    assert opened.js("ui.range[0]") == pytest.approx(low + 50, abs=1)
    opened.press("0", text="0")
    assert opened.js("ui.range") is None


def test_scale_and_curves_are_switched(opened):
    kind = "graphs.get('plot-loss').element._fullLayout.yaxis.type"
    assert opened.js(kind) == "log"
    opened.js("document.querySelector('[data-do=log]').click()")
    assert opened.js(kind) == "linear"
    names = "graphs.get('plot-loss').element.data.map(t => t.name)"
    assert "loss" in opened.js(names)
    opened.js("document.querySelector('[data-do=raw]').click()")
    assert "loss" not in opened.js(names)
    assert "smoothed" in opened.js(names)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_and_can_be_read(opened, width, dark):
    opened.look(width=width, dark=dark)
    opened.until(f"document.documentElement.dataset.theme === '{'dark' if dark else 'light'}'")
    opened.until("document.documentElement.scrollWidth <= innerWidth")
    ratios = opened.js(CONTRASTS)
    assert len(ratios) > 20
    assert {text: ratio for text, ratio in ratios if ratio < 4.5} == {}


CONTRASTS = """(() => {
  const linear = (v) => ((v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  const parts = (c) => c.match(/[\\d.]+/g).map(Number);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = parts(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const texts = 'h1,h2,h3,p,dt,dd,td,th,a,button,select,label,summary,.tag';
  return [...document.querySelectorAll(texts)].filter(e => e.innerText && e.offsetParent).map(e => {
    const [a, b] = [light(parts(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    return [e.innerText.slice(0, 40), (a + .05) / (b + .05)];
  });
})()"""


def test_it_prints(opened):
    import base64

    pdf = base64.b64decode(opened.send("Page.printToPDF", paperWidth=8.3, paperHeight=11.7)["data"])
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 20_000
    opened.until("document.documentElement.dataset.theme === 'light'")


EVIL = [
    "<script>window.bad=1</script>", "\"><img src=x onerror='window.bad=1'>",
    "</script><script>window.bad=1</script>",
    "<a href='javascript:window.bad=1'>x</a>", "<b>bold</b>%{x}&lt;i&gt;",
    "\u202egnp.exe", "x" * 10_000, "\u2028\u2029", "<!--<script>",
]  # fmt: skip


def rolled_back(step, name):
    """What a governor tells of a rollback at ``step``, with a stranger's name in it."""
    verdict = {
        "kind": "verdict", "step": step, "reason": "NON_FINITE_STATE", "rollback": True, "loss": 1.0,
        "mean": 1.0, "std": 0.1,
        "thresholds": [10, 2, 3], "consecutive_panics": 0, "tensor_name": name, "tag": name,
    }  # fmt: skip
    report = {**verdict, "restored_capture": 1, "restored_step": step - 8, "steps_lost": 8, "reward": -10.0}
    fault = {"kind": "fault", "step": step - 3, "name": name}
    return [fault, verdict, {"kind": "rollback", "step": step, "report": report}]


def test_a_name_is_never_html(page, make_run, tmp_path):
    run = make_run(
        metrics=[
            {
                "kind": "step",
                "step": s,
                "loss": 1 / s,
                "stage": EVIL[s // 12 % len(EVIL)],
                EVIL[0]: 1.0,
                EVIL[4]: 2.0,
            }
            for s in range(1, 120)
        ]
        + [{"kind": "validation", "step": 50, **dict.fromkeys(EVIL, 2.0)}],
        events=[event for at, name in enumerate(EVIL, 1) for event in rolled_back(10 * at, name)],
        config={"task": EVIL[0], "slot": EVIL[1], "settings": dict.fromkeys(EVIL, 3)},
        name="<script>window.bad=1<",
    )
    page.errors.clear()
    page.look()
    page.open(write_report([run], tmp_path / "page.html").as_uri())
    page.until(f"document.querySelectorAll('.card').length === {len(EVIL)}")
    page.js(
        "(async () => { for (let y = 0; y < document.body.scrollHeight; y += 600) "
        "{ scrollTo(0, y); await new Promise(r => setTimeout(r, 50)); } })()"
    )
    assert page.errors == []
    assert page.js("window.bad") is None
    assert (
        page.js(
            "document.querySelectorAll('main img, main script, main b, a[href^=javascript], svg a').length"
        )
        == 0
    )
    texts = page.js("[...document.querySelectorAll('.card')].map(e => e.innerText)")
    titles = page.js(
        "[...document.querySelectorAll('.card')]"
        ".map(e => [...e.querySelectorAll('[title]')].map(t => t.title).join())"
    )
    for text, title, name in zip(texts, titles, EVIL, strict=True):
        shown = {
            "\u202egnp.exe": "[U+202E Right-To-LeftOverride]gnp.exe",
            "\u2028\u2029": "[U+2028 LineSeparator]",
        }.get(name, name[:100])
        assert shown in text
        assert len(text) < 5000
        assert len(name) < 10_000 or name in title
    assert page.js("document.documentElement.scrollWidth <= innerWidth")
    assert "\u202e" not in page.js("document.documentElement.innerText")


def test_runs_beside_each_other(page, digits, make_run, tmp_path):
    config = json.loads((digits / "config.json").read_text())
    other = make_run(
        metrics=[{"kind": "step", "step": s, "loss": 2 / s} for s in range(1, 300)],
        config={**config, "governor": None},
    )
    page.errors.clear()
    page.open(write_report([digits, other], tmp_path / "both.html").as_uri())
    page.until("document.querySelectorAll('#plot-all-loss .scatterlayer .trace').length === 2")
    assert page.js("document.querySelectorAll('#beside tbody tr').length") == 2
    assert "governor" in page.js("document.getElementById('differences').textContent")
    page.js("run.value = '1', run.dispatchEvent(new Event('change'))")
    page.until("document.getElementById('which-run').textContent.startsWith('run')")
    assert page.errors == []


def test_ten_million_steps_open_at_once(page, tmp_path, make_run):
    """The page of a long run is no larger and no slower than its curves, which are bounded."""
    import numpy as np

    from tolaria.report.page import data_of, render
    from tolaria.report.reading import RunReading

    run = RunReading(make_run(metrics=[{"kind": "step", "step": 1, "loss": 1.0, "lr": 0.1}]))
    run.refresh()
    for start in range(2, 10_000_000, 1_000_000):
        steps = np.arange(start, start + 1_000_000, dtype=np.float64)
        run.loss.add(steps, np.sin(steps) + 2)
        run.smooth.add(steps[::10], np.sin(steps[::10] / 1e5) + 2)
        for curve in (*run.judged.values(), *run.curves.values()):
            curve.add(steps[::100], np.cos(steps[::100]) + 2)
    run.loss.one(7_654_321, 1e9)
    run.last_step = 10_000_000
    file = tmp_path / "long.html"
    file.write_bytes(render(data_of([run], tmp_path)))
    assert file.stat().st_size < 20e6
    page.errors.clear()
    page.open(file.as_uri())
    page.until("document.querySelectorAll('#plot-loss .scatterlayer .trace').length > 1")
    drawn = page.js("current().panels[0].series[0].x.indexOf(7654321) >= 0")
    assert drawn, "the spike is not lost"
    assert page.errors == []


def test_watch_shows_new_points(page, make_run):
    from tolaria.report.server import Server, Watched

    run = make_run(metrics=[{"kind": "step", "step": s, "loss": 1 / s} for s in range(1, 50)])
    watched = Watched(run)
    with Server(("127.0.0.1", 0), watched) as server:
        threads = [threading.Thread(target=server.serve_forever), threading.Thread(target=watched.follow)]
        for thread in threads:
            thread.start()
        try:
            page.errors.clear()
            page.send(
                "Network.emulateNetworkConditions",
                offline=False,
                latency=0,
                downloadThroughput=-1,
                uploadThroughput=-1,
            )
            page.open(f"http://127.0.0.1:{server.server_address[1]}/")
            page.until("current().last === 49 && document.querySelectorAll('#plot-loss .trace').length > 0")
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"kind": "step", "step": 50, "loss": 7.0}) + "\n")
            began = time.monotonic()
            page.until("graphs.get('plot-loss').element.data[0].y.at(-1) === 7")
            print("seen after", time.monotonic() - began)
            assert page.errors == []
        finally:
            page.open("about:blank")
            watched.stop()
            server.shutdown()
            for thread in threads:
                thread.join()
