"""A story on CUDA: captures hold its place, and no step of the governor waits for the device."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.device_run import no_host_sync
from tolaria import GovernorConfig, load_snapshot
from tolaria.train import GrowthObserver, StepRecord, StoryContext, grow
from tolaria.train.bookmark import EXTRA, Bookmark

PHASES = {"host_steps": 14, "incubate_steps": 14, "blend_steps": 14, "finish_steps": 8}


class Watch(GrowthObserver):
    """Forbids the governor's steps to wait, and saves in each phase."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.steps = folder, Counter[str]()

    def on_start(self, context: StoryContext) -> None:
        assert context.governor is not None
        self.save, step = context.save, context.governor.step

        def without_sync(*arguments: object, **options: object) -> None:
            with no_host_sync():
                step(*arguments, **options)  # type: ignore[arg-type]

        context.governor.step = without_sync  # type: ignore[method-assign]

    def on_step(self, record: StepRecord) -> None:
        self.steps[record.phase] += 1
        if self.steps[record.phase] == 13:
            self.save(self.folder / record.phase).result()


@pytest.mark.cuda
def test_captures_hold_the_place_and_no_step_waits(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    config = GovernorConfig(snapshot_interval=3, probation=1)
    grow(
        "digits", device="cuda", observers=[watch], governor_config=config, min_gain=-1e9, validate_every=7,
        **PHASES,
    )  # fmt: skip
    assert watch.steps == {"host": 14, "incubate": 14, "blend": 14, "finish": 8}
    wanted = ("host", "dormant", False), ("incubate", "training", True), ("blend", "blending", True)
    for phase, stage, has_seed in wanted:
        mark = Bookmark.from_plain(load_snapshot(tmp_path / phase)["extras"][EXTRA])
        assert mark.phase == phase
        assert mark.slot["stage"] == stage
        assert (mark.seed is not None) is has_seed
        assert all(value.is_cpu for value in (mark.seed or {}).values())
        assert mark.phase_start < mark.step < mark.phase_end
    assert mark.slot["schedule"]["position"] == mark.step - mark.phase_start
