"""Snapshots on disk: whole or absent, read without trust; knows tensors and a document, no governor.

A snapshot is a folder ``step_000000123`` that ``torch.distributed.checkpoint.load`` can read (and reshard),
with a ``document.json`` beside the tensors.
"""

from tolaria.snapshot.persist.folders import as_path, clear
from tolaria.snapshot.persist.loading import newest, read
from tolaria.snapshot.persist.saving import write

__all__ = ["as_path", "clear", "newest", "read", "write"]
