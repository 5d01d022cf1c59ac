"""The one door: formats by name and by file, plug-ins, and what it says of a wrong name."""

from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from ffpretrain.datasets import InMemoryDataset, open_dataset, registry
from ffpretrain.datasets.frames import Dataset, DatasetMetadata, Frame
from ffpretrain.errors import ConfigError, DataError

ONE = Frame(numbers=np.array([1]), positions=np.zeros((1, 3)))


def read_toy(path: str, *, count: int = 1) -> Dataset:
    return InMemoryDataset([ONE] * count, DatasetMetadata(name=f"toy-{path}"))


def add_plugin(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    point = EntryPoint(name, f"{__name__}:read_toy", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])


def test_plugin_format_is_opened_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    add_plugin(monkeypatch, "toy")
    monkeypatch.setattr(registry.Format, "reader", lambda self: read_toy)
    dataset = open_dataset("toy", "here", count=3)
    assert len(dataset) == 3
    assert dataset.metadata.name == "toy-here"


def test_plugin_cannot_replace_a_built_in_format(monkeypatch: pytest.MonkeyPatch) -> None:
    add_plugin(monkeypatch, "rmd17")
    with pytest.raises(ConfigError, match="rmd17"):
        open_dataset("rmd17", "aspirin")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rmd18", "aspirin"), "did you mean 'rmd17'"),
        (("rmd17", "asprin"), "did you mean 'aspirin'"),
        (("md17", "benzene"), "benzene2017"),
        (("etanol-gfn2",), "did you mean 'ethanol-gfn2'"),
        (("rmd17",), "needs a file or molecule"),
        (("nowhere/file.extxyz",), "no such xyz file"),
        (("nowhere/file.npz",), "no such .npz file"),
    ],
)
def test_wrong_names_offer_the_nearest(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(*arguments)
    assert "\n" not in str(caught.value)


def test_unknown_option_offers_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'labels'"):
        open_dataset("rmd17", "aspirin", lables="revised")


def test_unknown_ending_lists_formats(tmp_path: Path) -> None:
    file = tmp_path / "frames.pdb"
    file.write_text("x")
    with pytest.raises(DataError, match=r"no format has this ending.*extxyz"):
        open_dataset(file)


def test_missing_file_offers_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "water.extxyz").write_text("1\n\nH 0 0 0\n")
    with pytest.raises(DataError, match=r"did you mean 'water\.extxyz'"):
        open_dataset(tmp_path / "watr.extxyz")


@pytest.mark.parametrize(
    "name", ["empty.extxyz", "empty.npz", "empty.traj", "empty.db", "empty.sdf", "empty.h5"]
)
def test_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"empty \(0 bytes\)"):
        open_dataset(tmp_path / name)


def test_every_built_in_format_can_be_imported() -> None:
    for name, known in registry.FORMATS.items():
        assert callable(known.reader()), name
        assert known.summary


def test_bundled_dataset_opens() -> None:
    dataset = open_dataset("ethanol-gfn2")
    assert len(dataset) == 1200
    assert dataset.metadata.level_of_theory == "GFN2-xTB"
    assert sorted(dataset[0].numbers) == [1] * 6 + [6, 6, 8]


def test_store_opens_by_its_ending(tmp_path: Path) -> None:
    from ffpretrain.datasets.store import FrameStore, write_store

    write_store(tmp_path / "one.h5", InMemoryDataset([ONE], DatasetMetadata(name="one")))
    assert isinstance(open_dataset(tmp_path / "one.h5"), FrameStore)
