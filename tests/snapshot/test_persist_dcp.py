"""What is written is a checkpoint of ``torch.distributed.checkpoint``, and reads as one."""

from __future__ import annotations

import dataclasses
import io
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tolaria.snapshot.persist import write
from tolaria.snapshot.persist.tensor_bytes import DTYPES

pytestmark = pytest.mark.filterwarnings(  # of torch's own save and load
    "ignore:torch.distributed is disabled:UserWarning",
    "ignore:TypedStorage is deprecated:UserWarning",
    "ignore:(ComplexHalf|BComplex32) support is experimental:UserWarning",
)
TENSORS = {
    "model.weight": torch.arange(12.0).view(3, 4),
    "optimizer.state.0.step": torch.tensor(7.0),
    "optimizer.state.0.moment": torch.rand(3, 4, dtype=torch.float64).t(),
    "empty": torch.empty(0, 2),
    "mask": torch.tensor([True, False]),
    "ids": torch.tensor([300, -1]),
    **{
        name: torch.arange(64, dtype=torch.uint8).view(dtype)
        for name, dtype in DTYPES.items()
        if name not in ("bool", "float4_e2m1fn_x2")  # the last has no copy in torch 2.9
    },
}
SHARDED = """
import os, sys
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DeviceMesh, Shard, zeros

folder, store = sys.argv[1:]
children = []
for rank in range(2):
    if not (child := os.fork()):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        half = zeros(6, 4, device_mesh=DeviceMesh("cpu", [0, 1]), placements=[Shard(0)])
        dcp.load({"w": half}, checkpoint_id=folder)
        expected = torch.arange(24.0).view(6, 4)[3 * rank : 3 * rank + 3]
        os._exit(0 if torch.equal(half.to_local(), expected) else 1)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*raw)


def test_plain_load_finds_the_tensors_by_their_names(tmp_path: Path) -> None:
    path = write(tmp_path, 1, TENSORS, {})
    found = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in TENSORS.items()}
    dcp.load(found, checkpoint_id=path, no_dist=True)
    assert [name for name in TENSORS if not same(TENSORS[name], found[name])] == []


def test_plain_load_finds_some_of_them(tmp_path: Path) -> None:
    path = write(tmp_path, 1, TENSORS, {})
    found = {"ids": torch.zeros(2, dtype=torch.int64)}
    dcp.load(found, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    assert found["ids"].tolist() == [300, -1]


def test_torch_converts_it(tmp_path: Path) -> None:
    path = write(tmp_path, 1, TENSORS, {})
    dcp_to_torch_save(path, tmp_path / "whole.pt")
    found = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert [name for name in TENSORS if not same(TENSORS[name], found[name])] == []


def test_two_ranks_load_a_half_each(tmp_path: Path) -> None:
    path = write(tmp_path, 1, {"w": torch.arange(24.0).view(6, 4)}, {})
    command = [sys.executable, "-W", "ignore", "-c", SHARDED, str(path), str(tmp_path / "store")]
    subprocess.run(command, check=True, timeout=300)


def test_the_metadata_is_what_torch_writes(tmp_path: Path) -> None:
    path = write(tmp_path, 1, TENSORS, {})
    dcp.save(TENSORS, checkpoint_id=tmp_path / "torch", no_dist=True)
    ours = pickle.loads((path / ".metadata").read_bytes())
    theirs = pickle.loads((tmp_path / "torch" / ".metadata").read_bytes())
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    assert ours.version == theirs.version
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    assert type(ours.storage_meta) is type(theirs.storage_meta)
    for place in ours.storage_data.values():
        assert (
            dataclasses.asdict(place).keys()
            == dataclasses.asdict(next(iter(theirs.storage_data.values()))).keys()
        )


def test_each_tensor_is_an_archive_of_torch_and_a_proper_zip(tmp_path: Path) -> None:
    path = write(tmp_path, 1, TENSORS, {})
    metadata = dcp.FileSystemReader(path).read_metadata()
    data = (path / "__0_0.distcp").read_bytes()
    for index, place in metadata.storage_data.items():
        archive = data[place.offset : place.offset + place.length]
        assert zipfile.ZipFile(io.BytesIO(archive)).testzip() is None
        assert same(torch.load(io.BytesIO(archive), weights_only=True), TENSORS[index.fqn])
