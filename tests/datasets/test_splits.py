"""Splits: seeded, saved, and refused where frames would leak."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ffpretrain.datasets import InMemoryDataset, open_dataset
from ffpretrain.datasets.frames import Dataset, DatasetMetadata, Frame
from ffpretrain.datasets.splits import Splits, load_splits, published_split, random_split, save_splits
from ffpretrain.errors import ConfigError, DataError

ONE = Frame(numbers=np.array([1]), positions=np.zeros((1, 3)))


def dataset(n_frames: int = 20, **metadata: Any) -> Dataset:
    known: dict[str, Any] = {"name": "toy", "sha256": {"toy.npz": "ab"}, **metadata}
    return InMemoryDataset([ONE] * n_frames, DatasetMetadata(**known))


def test_same_seed_same_split() -> None:
    one, other, third = (random_split(1000, (950, 50), seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.train, other.train)
    assert one.sizes() == {"train": 950, "val": 50, "test": 0}
    assert set(one.train) | set(one.val) == set(range(1000))
    assert list(one.train) != list(third.train)


def test_split_does_not_depend_on_the_numpy_version() -> None:
    # the raw stream of PCG64(0) is fixed for ever: these numbers must never change
    assert random_split(10, (3, 2, 4), 0).train.tolist() == [3, 2, 1]


def test_parts_are_disjoint_and_drawn_from_everywhere() -> None:
    splits = random_split(5000, (100, 100, 100), 3)
    joined = np.concatenate([splits.train, splits.val, splits.test])
    assert len(set(joined)) == 300
    assert joined.max() > 4500
    assert 2000 < joined.mean() < 3000


@pytest.mark.parametrize(
    ("n_frames", "sizes", "seed", "error"),
    [
        (10, (8, 3), 0, DataError),
        (10, (8,), 0, ConfigError),
        (10, (1, 1, 1, 1), 0, ConfigError),
        (10, (-1, 5), 0, ConfigError),
        (10, (1.5, 5), 0, ConfigError),
        (10, (5, 5), -1, ConfigError),
    ],
)
def test_impossible_splits(n_frames: int, sizes: Any, seed: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        random_split(n_frames, sizes, seed)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"train": [1, 2], "val": [2, 3]}, "'train' and 'val' share 1 frames, first frame 2"),
        ({"train": [1, 2], "test": [5, 1]}, "'train' and 'test' share 1 frames, first frame 1"),
        ({"train": [1], "val": [4], "test": [4]}, "'val' and 'test' share"),
        ({"train": [1, 2, 1]}, "frame 1 stands twice in 'train'"),
        ({"train": [1, 20]}, "'train' names frame 20, which does not exist, the last is 19"),
        ({"train": [-1, 2]}, "'train' names frame -1"),
        ({"train": [1.0, 2.0]}, "expected a list of frame indices"),
        ({"train": [[1], [2]]}, "expected a list of frame indices"),
    ],
)
def test_bad_parts(parts: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        Splits(**{name: np.array(values) for name, values in parts.items()}, n_frames=20)
    (tmp_path / "s.json").write_text(json.dumps({"n_frames": 20, **parts}))
    with pytest.raises(DataError, match=r"s\.json: .*" + message):
        load_splits(tmp_path / "s.json")


@pytest.mark.parametrize("name", ["splits.json", "splits.npz"])
def test_saved_splits_come_back(tmp_path: Path, name: str) -> None:
    data = dataset()
    splits = random_split(20, (10, 5, 3), 7, data)
    save_splits(tmp_path / "new" / name, splits)
    again = load_splits(tmp_path / "new" / name, data)
    for part in ("train", "val", "test"):
        np.testing.assert_array_equal(again[part], splits[part])
    assert (again.seed, again.n_frames, again.dataset) == (7, 20, "toy")
    assert [p.name for p in (tmp_path / "new").iterdir()] == [name]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dataset(19), "dataset of 20 frames, 'toy' has 19"),
        (dataset(20, sha256={"toy.npz": "cd"}), "made for other files"),
    ],
)
def test_splits_of_another_dataset(tmp_path: Path, other: Dataset, message: str) -> None:
    save_splits(tmp_path / "s.json", random_split(20, (10, 5), 7, dataset()))
    with pytest.raises(DataError, match=message):
        load_splits(tmp_path / "s.json", other)
    with pytest.raises(DataError, match=message):
        load_splits(tmp_path / "s.json").apply(other)


def test_parts_of_a_dataset() -> None:
    parts = random_split(20, (10, 5), 7).apply(dataset())
    assert {name: len(part) for name, part in parts.items()} == {"train": 10, "val": 5, "test": 0}


@pytest.mark.parametrize(
    "names", [("train_idx", "val_idx", "test_idx"), ("idx_train", "idx_val", "idx_test")]
)
def test_split_files_of_other_programs(tmp_path: Path, names: tuple[str, ...]) -> None:
    np.savez(tmp_path / "split.npz", **dict(zip(names, ([3, 1], [2], [0]), strict=True)))
    splits = load_splits(tmp_path / "split.npz")
    assert (splits.train.tolist(), splits.val.tolist(), splits.test.tolist()) == ([3, 1], [2], [0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[1, 2]", "is no split file"),
        ('{"format": "something"}', "is no split file"),
        ('{"val": [1]}', "has no 'train' part"),
        ('{"train": [1], "version": 99}', "newer version"),
    ],
)
def test_bad_split_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(DataError, match=message):
        load_splits(tmp_path / "s.json")


def test_published_split_is_used_as_it_is(shared_data: Path) -> None:
    data = open_dataset("rmd17", "uracil", split=1, root=shared_data / "rmd17")
    splits = published_split(data)
    assert splits.train.tolist() == list(range(1000))
    assert splits.test.tolist() == list(range(1000, 2000))
    with pytest.raises(DataError, match="no published split 'valid'; it has: train, test"):
        published_split(data, val="valid")


def test_unwritable_folder_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        save_splits(tmp_path / "file" / "s.json", random_split(20, (10, 5), 7))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
