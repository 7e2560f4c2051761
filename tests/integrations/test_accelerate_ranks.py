"""Two processes under Accelerate go back together."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from trainers import need, poisoned_files

accelerate = need("accelerate")

from tolaria import GovernorConfig  # noqa: E402  (behind the look for what it needs)
from tolaria.integrations.accelerate import guard  # noqa: E402


def train(rank: int, port: int, folder: Path) -> None:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # that of the parent
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**environment, "MASTER_ADDR": "127.0.0.1"}.items():
            patch.setenv(name, str(value))
        _train(rank, folder, accelerate.Accelerator(cpu=True))
    torch.distributed.destroy_process_group()


def _train(rank: int, folder: Path, accelerator: Any) -> None:
    assert accelerator.num_processes == 2
    torch.manual_seed(0)
    inner = nn.Linear(4, 3)
    model, optimizer = accelerator.prepare(inner, torch.optim.AdamW(inner.parameters()))
    config = GovernorConfig.balanced(snapshot_interval=4, probation=1)
    governor = guard(accelerator, model, optimizer, config=config, num_classes=3)
    for step in range(1, 21):
        draws = torch.Generator().manual_seed(2 * step + rank)
        labels = torch.randint(3, (8,), generator=draws)
        accelerator.backward(nn.functional.cross_entropy(model(torch.randn(8, 4, generator=draws)), labels))
        if step == 12 and rank == 1:
            inner.weight.grad[0, 0] = math.nan  # behind the reduction: on this rank alone
        optimizer.step()
        optimizer.zero_grad()
        accelerator.save_state(folder / str(step))
    governor.close()
    found = [governor.step_count, governor.rollback_count, governor.last_report.restored_step]
    (folder / f"{rank}.json").write_text(json.dumps([*found, inner.weight.tolist()]))


def test_ranks_go_back_together(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(train, (port, tmp_path), nprocs=2, start_method="fork")
    ends = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ends[0] == ends[1]
    assert ends[0][:3] == [20, 1, 8]
    assert poisoned_files(tmp_path, "*.safetensors", "*.bin") == []
