"""Readers, splits, the frame store, labelling and downloads. One door: :func:`open_dataset`."""

from __future__ import annotations

from ffpretrain.datasets.frames import Dataset, DatasetMetadata, Frame, InMemoryDataset
from ffpretrain.datasets.registry import open_dataset

__all__ = ["Dataset", "DatasetMetadata", "Frame", "InMemoryDataset", "open_dataset"]
