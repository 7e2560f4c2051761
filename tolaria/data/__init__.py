"""What data loaders have to do with a governor."""

from tolaria.data.skip_batches import LeftOutBatch, SkipBatches

__all__ = ["LeftOutBatch", "SkipBatches"]
