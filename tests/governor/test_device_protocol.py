"""Between host and device: whose the host-side parts are, when news is followed, who waits for what."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from device_run import no_host_sync, usual_schedule
from torch import Tensor, nn

from tolaria.errors import TolariaError, UncoveredWarning
from tolaria.governor import GovernorBank, GovernorConfig, SeedCulledEvent, TolariaGovernor
from tolaria.nn import SeedSlot
from tolaria.ops import StatusField

pytestmark = [
    pytest.mark.cuda,
    # what a recording that failed leaves behind belongs to its stream
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match"),
]


@pytest.fixture
def lazily() -> Iterator[Any]:
    """A device that runs nothing until somebody waits: news is as late as it can be."""
    vgpu = pytest.importorskip("vgpu", reason="needs a device that runs nothing until it must")
    torch.cuda.synchronize()
    vgpu.schedule("lazy")
    yield vgpu
    torch.cuda.synchronize()
    vgpu.schedule(usual_schedule())


class Run:
    """Plain AdamW, which counts its steps on the host, and a scheduler."""

    def __init__(self, *, capturable: bool = False, lr: Any = 1e-2, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 4).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, capturable=capturable)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.99)
        config = GovernorConfig(**{"snapshot_interval": 5, "probation": 1, **settings})
        self.governor = TolariaGovernor(
            self.model, self.optimizer, config=config, schedulers=[self.scheduler]
        )
        self.x = torch.ones(2, 4, device="cuda")
        self.bad = torch.full((), float("nan"), device="cuda")

    def forward(self, *, poison: bool = False) -> Tensor:
        loss = self.model(self.x).square().mean()
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        return loss * self.bad if poison else loss

    def step(self, *, poison: bool = False, hear: bool = True) -> None:
        loss = self.forward(poison=poison)
        self.optimizer.step()
        self.scheduler.step()
        self.governor.step(loss)
        if hear:
            torch.cuda.synchronize()
            self.governor.poll()

    def counter(self) -> float:
        return float(next(iter(self.optimizer.state.values()))["step"])

    def record(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.governor.wait()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self.forward()
            self.optimizer.step()
            self.governor.step(loss)
        self.governor.wait()
        torch.cuda.synchronize()
        return graph


# -- which host-side parts -------------------------------------------------------------------------------


def refuse_shapes(run: Run) -> None:
    for _ in range(3):
        with pytest.raises(ValueError, match="loss"):
            run.governor.step(torch.ones(2, device="cuda"))


def refuse_devices(run: Run) -> None:
    with pytest.raises(ValueError, match="loss: expected on cuda"):
        run.governor.step(torch.ones(()))


def fail_to_record(run: Run) -> None:
    for _ in range(2):
        torch.cuda.synchronize()
        with pytest.raises(TolariaError, match="capturable"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            run.governor.step(run.bad)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("trouble", [refuse_shapes, refuse_devices, fail_to_record])
def test_host_parts_are_those_of_the_restored_capture(trouble: Any) -> None:
    run = Run()
    run.step()
    trouble(run)
    for _ in range(13):
        run.step()
    run.step(poison=True)
    report = run.governor.last_report
    assert report is not None
    assert report.restored_step == 10
    assert (run.counter(), run.scheduler.last_epoch) == (10.0, 10)


def test_recordings_are_not_judgements() -> None:
    run = Run(capturable=True)
    graphs = [run.record() for _ in range(3)]
    assert run.governor._engine.enqueued_step == run.governor.step_count == 9
    for _ in range(13):
        run.step()
    run.step(poison=True)
    report = run.governor.last_report
    assert report is not None
    assert run.scheduler.last_epoch == report.restored_step
    del graphs


def test_replays_that_nobody_heard_of_do_not_shift_the_host_parts(lazily: Any) -> None:
    run = Run(capturable=True, snapshot_interval=4)
    graph = run.record()
    lazily.schedule("lazy")
    epochs: dict[int, int] = {}
    for i in range(4, 24):
        if i % 5 == 0:
            run.step(poison=i == 20, hear=False)
        else:
            run.governor.wait()
            graph.replay()
            run.scheduler.step()
        epochs[i] = run.scheduler.last_epoch
    run.governor.synchronize()
    report = run.governor.last_report
    assert report is not None
    assert report.step == 20
    expected = epochs[report.restored_step] if report.restored_step % 5 == 0 else None
    assert expected is None or run.scheduler.last_epoch == expected


def test_inactive_rows_are_not_counted() -> None:
    bank = GovernorBank(2, device="cuda", config=GovernorConfig(snapshot_interval=5, probation=1))
    model = nn.Linear(2, 2).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    bank.attach(0, model, optimizer, schedulers=[scheduler])
    losses = torch.ones(2, device="cuda")
    optimizer.step()
    for i in range(40):
        active = torch.tensor([i % 4 == 0, True], device="cuda")
        bank.step(losses, active=active)
        torch.cuda.synchronize()
        if i % 4 == 0:
            scheduler.step()
    assert bank._engines[0].enqueued_step == bank._rows[0].reader.status(StatusField.step) == 10
    bank.step(torch.full_like(losses, float("nan")))
    torch.cuda.synchronize()
    bank.step(losses)
    captured = bank._rows[0].reader.status(StatusField.restored_step)
    assert captured == 5
    assert scheduler.last_epoch == captured - 1, "a capture is made before the scheduler's step"


# -- when news is followed -------------------------------------------------------------------------------


def test_nothing_is_heard_while_recording(lazily: Any) -> None:
    rate = torch.tensor(1e-2, device="cuda")
    run = Run(capturable=True, lr=rate, lr_factor=0.5, max_rollbacks=100)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(5):
            loss = run.forward(poison=i == 4)
            run.optimizer.step()
            run.governor.step(loss)
    del loss  # and with it the nodes of its graph, which belong to the side stream
    torch.cuda.current_stream().wait_stream(side)
    run.governor.wait()
    lazily.run_all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = run.forward()
        run.optimizer.step()
        run.governor.step(loss)
        assert run.governor.poll() == [] or run.governor.last_report is None
        for call in (run.governor.snapshot, run.governor.state_dict):
            with pytest.raises(TolariaError, match="expected no CUDA graph to be recorded"):
                call()
    assert run.governor.last_report is None
    for _ in range(5):
        graph.replay()
    run.governor.synchronize()
    assert run.governor.rollback_count == 1
    assert float(rate) == pytest.approx(0.5e-2)
    assert run.scheduler.last_epoch == 0


def test_poll_in_mid_step_only_tells(lazily: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 8).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    config = GovernorConfig(snapshot_interval=4, probation=1, lr_factor=0.5)
    governor = TolariaGovernor(model, optimizer, scaler=scaler, config=config)
    x = torch.ones(2, 8, device="cuda")
    for i in range(1, 12):
        loss = model(x).square().mean()
        optimizer.zero_grad(set_to_none=False)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if i == 9:
            lazily.run_all()
            before = model.weight.grad.clone()  # type: ignore[union-attr]
            assert "rollback" in {e.kind for e in governor.poll()}
            assert "rollback" not in {e.kind for e in governor.synchronize()}
            assert torch.equal(before, model.weight.grad)  # type: ignore[arg-type]
            assert optimizer.param_groups[0]["lr"] == 1e-2
        scaler.step(optimizer)
        scaler.update()
        governor.step(loss * float("nan") if i == 8 else loss)
        assert optimizer.param_groups[0]["lr"] == (1e-2 if i < 9 else 0.5e-2)


def test_poll_in_another_thread_only_tells(lazily: Any) -> None:
    run = Run(lr_factor=0.5)
    for i in range(8):
        run.step(poison=i == 7, hear=False)
    lazily.run_all()
    told: list[str] = []
    thread = threading.Thread(target=lambda: told.extend(e.kind for e in run.governor.poll()))
    before = run.scheduler.last_epoch, run.optimizer.param_groups[0]["lr"]
    thread.start()
    thread.join()
    assert "rollback" in told
    assert (run.scheduler.last_epoch, run.optimizer.param_groups[0]["lr"]) == before
    run.step(hear=False)
    assert run.optimizer.param_groups[0]["lr"] < 0.6 * before[1]


def test_a_host_that_looks_in_between_reconciles_later() -> None:
    run = Run()
    for i in range(9):
        run.step(poison=i == 8, hear=False)
    torch.cuda.synchronize()
    words = run.governor._attached.row.mailbox[0]
    words[StatusField.rollback_count] = 0.0  # the event is there, the count on its way
    run.governor.poll()
    assert run.governor.last_report is not None
    words[StatusField.rollback_count] = 1.0
    run.step()
    assert run.governor.last_report.restored_step == 5
    assert (run.counter(), run.scheduler.last_epoch) == (5.0, 5)


def test_a_bank_that_looks_in_between_reconciles_later() -> None:
    bank = GovernorBank(1, device="cuda")
    model = nn.Linear(2, 2).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    bank.attach(0, model, optimizer, schedulers=[scheduler])
    losses = torch.ones(1, device="cuda")
    optimizer.step()
    for _ in range(3):
        bank.step(losses)
        scheduler.step()
    bank.step(losses * float("nan"))
    torch.cuda.synchronize()
    bank._mailbox[0, StatusField.rollback_count] = 0.0
    bank.poll()
    bank._mailbox[0, StatusField.rollback_count] = 1.0
    bank.step(losses)
    assert scheduler.last_epoch == 0


def test_close_follows_what_it_hears(lazily: Any) -> None:
    run = Run(lr_factor=0.5)
    for i in range(4):
        run.step(poison=i == 3, hear=False)
    run.governor.close()
    assert run.scheduler.last_epoch == 0
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.5e-2)
    assert "rollback" in {e.kind for e in run.governor.poll()}


# -- who waits -------------------------------------------------------------------------------------------


def test_a_part_that_is_loaded_alone_waits_for_the_capture(lazily: Any) -> None:
    run = Run(snapshot_interval=100)
    model = nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64))).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = TolariaGovernor(model, optimizer, config=GovernorConfig(snapshot_interval=100, probation=1))
    model.add_module("late", nn.Linear(64, 64).cuda())
    optimizer.add_param_group({"params": list(model.late.parameters())})
    governor.notify_structure_changed()
    before = [p.detach().clone() for p in model.parameters()]
    other = nn.Linear(64, 64).cuda().state_dict()
    torch.cuda.synchronize()
    for seed in range(6):
        lazily.schedule(f"starve:{seed}" if seed else "lazy")
        governor.snapshot()
        model[1][0].load_state_dict(other)  # type: ignore[index]
        model.late.load_state_dict(other)
        governor.step(torch.ones((), device="cuda"))
        governor.synchronize()
        governor.execute_rollback()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), seed
    del run


@pytest.mark.parametrize("flag", [True, False])
def test_numbers_are_judged_without_waiting(flag: bool) -> None:
    run = Run()
    run.step()
    with no_host_sync():
        run.governor.step(1.0, nonfinite=flag, gradient_norm=2.0)
        run.governor.step(torch.ones((), device="cuda"), nonfinite=flag)
    run.governor.synchronize()
    assert run.governor.rollback_count == 2 * flag


def test_a_seed_does_not_inherit_the_flag_of_another(lazily: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), SeedSlot("s")).cuda()
    slot, x = model[1], torch.ones(2, 4, device="cuda")
    assert isinstance(slot, SeedSlot)
    config = GovernorConfig(snapshot_interval=100, seed_check_interval=1)
    governor = TolariaGovernor(model, torch.optim.SGD(model.parameters(), lr=0.1), config=config)
    seed = slot.germinate(lambda _: nn.Linear(4, 4).cuda(), x, rng_seed=1)
    slot.start_training()
    with torch.no_grad():
        next(seed.parameters()).fill_(float("nan"))
    governor.step(torch.ones((), device="cuda"))  # the search is on its way
    slot.cull()
    slot.germinate(lambda _: nn.Linear(4, 4).cuda(), x, rng_seed=2)
    slot.start_training()
    lazily.run_all()
    for _ in range(5):
        governor.step(torch.ones((), device="cuda"))
        lazily.run_all()
    assert slot.seed is not None
    assert not any(isinstance(e, SeedCulledEvent) for e in governor.synchronize())
    with torch.no_grad():
        next(slot.seed.parameters()).fill_(float("nan"))
    for _ in range(3):
        governor.step(torch.ones((), device="cuda"))
        torch.cuda.synchronize()
    assert slot.seed is None


def test_a_failed_recording_does_not_break_the_next() -> None:
    run = Run(capturable=True, snapshot_interval=3)
    first = run.record()

    def fail() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            run.governor.begin_step()
            run.forward()
            run.optimizer.step()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # without begin_step: the capture belongs to its end
        loss = run.forward()
        run.optimizer.step()
        run.governor.step(loss)
    run.governor.wait()
    before = run.governor.last_good_step
    for _ in range(12):
        graph.replay()
    run.governor.synchronize()
    assert run.governor.last_good_step > before
    for _ in range(4):
        run.step()
    run.step(poison=True)
    assert run.governor.rollback_count == 1
    del first


# -- graphs outlive memory -------------------------------------------------------------------------------


def junk(nbytes: int = 1 << 12, count: int = 64) -> list[Tensor]:
    """Memory that may lie where something was let go."""
    return [torch.full((nbytes,), 7, dtype=torch.uint8, device="cuda") for _ in range(count)]


def is_untouched(tensors: list[Tensor]) -> bool:
    return all(bool((t == 7).all()) for t in tensors)


def test_replays_after_loading_are_judged_on() -> None:
    run = Run(capturable=True, snapshot_interval=3)
    graph = run.record()
    for _ in range(5):
        graph.replay()
    run.governor.synchronize()
    saved = run.governor.state_dict()
    run.governor.load_state_dict(saved)
    foreign = junk()
    for _ in range(8):
        graph.replay()
    run.governor.synchronize()
    assert run.governor.step_count == 3 + 5 + 8
    assert run.governor.last_good_step > 8
    assert is_untouched(foreign)
    run.step(poison=True)
    assert run.governor.rollback_count == 1


@pytest.mark.parametrize("end", ["close", "collect", "another window"])
def test_replays_after_the_end_touch_nothing(end: str) -> None:
    run = Run(capturable=True, snapshot_interval=3)
    graph = run.record()
    for _ in range(5):
        graph.replay()
    run.governor.synchronize()
    if end == "close":
        run.governor.close()
    elif end == "collect":
        del run.governor
    else:
        other = TolariaGovernor(nn.Linear(1, 1), [], config=run.governor.config.replace(window=30))
        with pytest.warns(UncoveredWarning, match="graphs recorded before are no longer guarded"):
            run.governor.load_state_dict(other.state_dict(), keep_config=False)
    gc.collect()
    foreign = junk()
    for _ in range(8):
        graph.replay()
    torch.cuda.synchronize()
    assert is_untouched(foreign)
    if end == "another window":
        for _ in range(5):
            run.step()
        run.step(poison=True)
        assert run.governor.rollback_count == 1


def test_replays_after_growth_past_the_table_cover_what_has_grown() -> None:
    run = Run(capturable=True, snapshot_interval=3)
    graph = run.record()
    capacity = len(run.governor._engine.slots.table.data)
    for i in range(3 * capacity):
        run.model.register_buffer(f"b{i}", torch.full((5,), 1.0, device="cuda"))
    run.governor.notify_structure_changed()
    torch.cuda.synchronize()
    foreign = junk()
    for i in range(3 * capacity):
        run.model.get_buffer(f"b{i}").fill_(2.0)
    for _ in range(12):
        graph.replay()
    run.governor.synchronize()
    assert run.governor.last_good_step > 3
    assert is_untouched(foreign)
    for i in range(3 * capacity):
        run.model.get_buffer(f"b{i}").fill_(3.0)
    run.governor.execute_rollback()
    assert all(bool((run.model.get_buffer(f"b{i}") == 2.0).all()) for i in range(3 * capacity))


def test_reset_under_a_graph() -> None:
    run = Run(capturable=True, snapshot_interval=3)
    graph = run.record()
    for _ in range(5):
        graph.replay()
    run.governor.reset()
    for _ in range(8):
        graph.replay()
    run.governor.synchronize()
    assert run.governor.step_count == 16
    assert run.governor.last_good_step > 8


def test_a_governor_collected_while_recording_spoils_nothing() -> None:
    run, other = Run(capturable=True), Run(capturable=True)
    for _ in range(6):
        other.step(hear=False)
    run.record()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = run.forward()
        del other
        gc.collect()
        run.optimizer.step()
        run.governor.step(loss)
    graph.replay()
    run.governor.synchronize()
    assert run.governor.step_count == 4
