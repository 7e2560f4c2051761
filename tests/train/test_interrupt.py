from __future__ import annotations

import signal
import threading
from contextlib import nullcontext

import pytest

from tolaria.tasks import get_task
from tolaria.train import GrowthObserver, grow
from tolaria.train.interrupt import Interrupts


@pytest.fixture(autouse=True)
def ordinary_handlers():
    """Those of a shell's foreground job, whatever started the tests."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_waits_for_the_check(number):
    with Interrupts() as interrupts:
        signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


def test_second_signal_does_not_wait():
    with Interrupts():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_saving_is_spared_one_signal():
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        interrupts.spare()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_are_put_back_and_those_of_others_are_left_alone():
    def theirs(*_):
        pass

    signal.signal(signal.SIGTERM, theirs)
    with Interrupts():
        assert signal.getsignal(signal.SIGTERM) is theirs
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_change_nothing():
    seen = []

    def enter():
        with Interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


class Presser(GrowthObserver):
    """Presses Ctrl-C where it is told to, and keeps what it hears."""

    def __init__(self, at: str) -> None:
        self.at, self.heard = at, []

    def on_step(self, record) -> None:
        if self.at == "step" and record.step == 3:
            signal.raise_signal(signal.SIGINT)
        self.heard.append(record.step)

    def on_interrupt(self, step: int) -> None:
        self.heard.append("interrupt")

    def on_finish(self, result) -> None:
        if self.at in ("step", "finish"):
            signal.raise_signal(signal.SIGINT)  # while others save
        self.heard.append("finish")


@pytest.mark.parametrize(("at", "heard"), [("step", [1, 2, 3, "interrupt", "finish"]), ("finish", None)])
def test_run_ends_between_steps_and_is_saved(at, heard):
    presser = Presser(at)
    settings = get_task("digits").defaults.replace(
        host_steps=4, incubate_steps=0, blend_steps=1, finish_steps=0, max_germinations=0, validate_every=100
    )
    saved_late = pytest.raises(KeyboardInterrupt) if at == "finish" else nullcontext()
    with saved_late:  # a run that was over when the key was pressed does not swallow it
        result = grow("digits", settings=settings, observers=[presser], use_governor=False)
        assert result.interrupted
    assert presser.heard == (heard or [1, 2, 3, 4, 5, "finish"])
