"""The frame store: what goes in comes out, read lazily, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from ffpretrain.datasets import DatasetMetadata, Frame, InMemoryDataset, open_dataset
from ffpretrain.datasets.store import FrameStore, StoreWriter, write_store
from ffpretrain.datasets.store_writer import FORMAT_VERSION
from ffpretrain.errors import DataError

METADATA = DatasetMetadata(
    name="mixed",
    source="a test",
    sha256={"origin.npz": "0" * 64},
    level_of_theory="PBE/def2-SVP",
    energy_zero="separated atoms",
    licence="CC0-1.0",
    splits={"train": np.array([2, 0]), "test": np.array([1])},
    properties={"dipole": "e*angstrom"},
)


def random_frame(rng: np.random.Generator, n: int, **fields: Any) -> Frame:
    return Frame(rng.integers(1, 90, n), rng.normal(size=(n, 3)), **fields)


def mixed_frames() -> list[Frame]:
    """Molecules of different sizes, each lacking something else."""
    rng = np.random.default_rng(1)
    return [
        random_frame(rng, 3),
        random_frame(
            rng,
            5,
            cell=rng.normal(size=(3, 3)),
            pbc=(True, False, True),
            energy=-17600.123456789012,
            forces=rng.normal(size=(5, 3)),
            stress=rng.normal(size=(3, 3)),
            charge=-1,
            spin=2,
            fixed=np.array([True, False, False, True, False]),
            properties={
                "dipole": rng.normal(size=3),
                "gap": 0.25,
                "level": 3,
                "matrix": rng.normal(size=(5, 5)),
            },
        ),
        random_frame(rng, 1, energy=0.0, properties={"matrix": rng.normal(size=(1, 1)), "gap": -1.5}),
        random_frame(rng, 9, forces=rng.normal(size=(9, 3)), properties={"bound": True}),
        random_frame(rng, 2, energy=3.5, pbc=(False, False, False), properties={"dipole": np.zeros(3)}),
    ]


def assert_same(one: Frame, other: Frame) -> None:
    for name in ("numbers", "positions", "cell", "forces", "stress", "fixed"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            np.testing.assert_array_equal(a, b, err_msg=name)
    for name in ("pbc", "energy", "charge", "spin"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.properties.keys() == other.properties.keys()
    for name, value in one.properties.items():
        np.testing.assert_array_equal(value, other.properties[name])


@pytest.mark.parametrize("batch", [1, 2, 512])
@pytest.mark.parametrize("in_memory_bytes", [0, 10**9])
def test_round_trip_of_all_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, in_memory_bytes: int
) -> None:
    monkeypatch.setattr(StoreWriter, "BATCH", batch)
    frames = mixed_frames()
    write_store(tmp_path / "a.h5", InMemoryDataset(frames, METADATA), notes={"made": {"by": ["hand", 1]}})
    store = FrameStore(tmp_path / "a.h5", in_memory_bytes)
    assert len(store) == len(frames)
    assert store.n_atoms.tolist() == [3, 5, 1, 9, 2]
    for index in (4, 0, 1, 3, 2, 1):
        assert_same(store[index], frames[index])
    assert store.notes == {"made": {"by": ["hand", 1]}}
    assert_same(store[-1], frames[-1])
    assert [len(frame) for frame in store[1:4]] == [5, 1, 9]


def test_metadata_come_back(tmp_path: Path) -> None:
    write_store(tmp_path / "a.h5", InMemoryDataset(mixed_frames(), METADATA))
    metadata = FrameStore(tmp_path / "a.h5").metadata
    for name in ("name", "source", "level_of_theory", "energy_zero", "licence"):
        assert getattr(metadata, name) == getattr(METADATA, name)
    assert {name: indices.tolist() for name, indices in metadata.splits.items()} == {
        "train": [2, 0],
        "test": [1],
    }
    assert dict(metadata.properties) == {"dipole": "e*angstrom"}
    assert set(metadata.sha256) == {"origin.npz", "a.h5"}
    assert metadata.sha256["origin.npz"] == "0" * 64
    assert metadata.sha256["a.h5"] == hashlib.sha256((tmp_path / "a.h5").read_bytes()).hexdigest()
    assert metadata.units["forces"] == "eV/angstrom"


def test_a_frame_is_a_copy(tmp_path: Path) -> None:
    write_store(tmp_path / "a.h5", InMemoryDataset(mixed_frames(), METADATA))
    store = FrameStore(tmp_path / "a.h5")
    before = store[1].positions.copy()
    store[1].positions[:] = 0.0
    np.testing.assert_array_equal(store[1].positions, before)


def test_precision_as_chosen(tmp_path: Path) -> None:
    frames = mixed_frames()
    write_store(tmp_path / "a.h5", InMemoryDataset(frames, METADATA), positions="float32", forces="float32")
    frame = FrameStore(tmp_path / "a.h5")[1]
    assert frame.positions.dtype == np.float64
    np.testing.assert_array_equal(frame.positions, frames[1].positions.astype(np.float32))
    np.testing.assert_array_equal(frame.forces, np.asarray(frames[1].forces, np.float32))
    assert frame.energy == -17600.123456789012
    with pytest.raises(DataError, match="'float32' or 'float64', not 'float16'"):
        StoreWriter(tmp_path / "b.h5", METADATA, positions="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5"]


def test_the_file_holds_compressed_arrays_and_no_objects(tmp_path: Path) -> None:
    write_store(tmp_path / "a.h5", InMemoryDataset(mixed_frames(), METADATA))
    kinds = []

    def look(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            kinds.append(item.dtype.kind)
            if item.dtype.kind in "fiu" and not name.startswith("splits"):
                assert item.compression == "gzip" and item.shuffle and item.chunks, name

    with h5py.File(tmp_path / "a.h5") as file:
        file.visititems(look)
        assert json.loads(file["metadata"][()])["level_of_theory"] == "PBE/def2-SVP"
        assert file.attrs["format_version"] == FORMAT_VERSION
    assert set(kinds) <= set("fiubO")  # O: JSON texts of variable length


def large_store(path: Path) -> int:
    """Write 3,000 frames; damage the chunk with the positions of the last one. Return its index."""
    rng = np.random.default_rng(2)
    frames = [random_frame(rng, 4, energy=float(i), forces=rng.normal(size=(4, 3))) for i in range(3000)]
    write_store(path, InMemoryDataset(frames, METADATA))
    with h5py.File(path) as file:
        positions = file["positions"]
        chunk = positions.id.get_chunk_info(positions.id.get_num_chunks() - 1)
    with path.open("r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(b"\xff" * chunk.size)
    return len(frames) - 1


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    last = large_store(tmp_path / "a.h5")
    store = FrameStore(tmp_path / "a.h5", in_memory_bytes=0)
    assert store[0].energy == 0.0 and len(store) == last + 1
    with pytest.raises(DataError, match=rf"a\.h5: frame {last} cannot be read .*damaged"):
        store[last]
    assert store[1].energy == 1.0


def test_an_exception_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write_store(path, InMemoryDataset(mixed_frames(), METADATA))
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="stop"), StoreWriter(path, METADATA) as writer:
        writer.extend(mixed_frames())
        raise RuntimeError("stop")
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.h5"]


def test_a_killed_writer_leaves_no_store(tmp_path: Path) -> None:
    script = """
        import sys, time
        from ffpretrain.datasets import DatasetMetadata, Frame
        from ffpretrain.datasets.store import StoreWriter
        import numpy as np
        with StoreWriter(sys.argv[1], DatasetMetadata("killed")) as writer:
            for _ in range(1000):
                writer.append(Frame(np.ones(2, int), np.zeros((2, 3))))
            print("written", flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "a.h5")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "a.h5").exists()


def test_identical_frames_give_an_identical_file(tmp_path: Path) -> None:
    for name in ("a.h5", "b.h5"):
        write_store(tmp_path / name, InMemoryDataset(mixed_frames(), METADATA))
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (Frame(np.ones(0, int), np.zeros((0, 3))), "has no atoms"),
        (Frame(np.ones(2, int), np.zeros((3, 3))), r"positions has shape \(3, 3\) instead of \(2, 3\)"),
        (Frame(np.ones(2, int), np.full((2, 3), np.nan)), "positions holds a value that is not finite"),
        (Frame(np.ones(2, int), np.zeros((2, 3)), energy=np.inf), "energy holds a value that is not finite"),
        (Frame(np.ones(2, int), np.zeros((2, 3)), forces=np.zeros(6)), r"forces has shape \(6,\)"),
        (Frame(np.full(2, 300), np.zeros((2, 3))), "between 0 and 255"),
        (Frame(np.ones(2, int), np.zeros((2, 3)), properties={"a/b": 1.0}), "property name 'a/b'"),
        (Frame(np.ones(2, int), np.zeros((2, 3)), properties={"smiles": "CCO"}), "'smiles' is not numeric"),
        (Frame(np.ones(2, int), np.zeros((2, 3)), properties={"level": 0.5}), "'level' changes from int64"),
    ],
)
def test_frames_that_cannot_be_kept_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frame: Frame, message: str
) -> None:
    good = Frame(np.ones(1, int), np.zeros((1, 3)), properties={"level": 1})
    with (
        pytest.raises(DataError, match=message) as caught,
        StoreWriter(tmp_path / "a.h5", METADATA) as writer,
    ):
        writer.append(good)
        writer._flush()
        writer.append(frame)
    assert "\n" not in str(caught.value) and "a.h5" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("energy forces\n")
    elif how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        with h5py.File(path, "r+") as file:
            if how == "foreign":
                del file.attrs["format"]
            elif how == "newer":
                file.attrs["format_version"] = FORMAT_VERSION + 1
            elif how == "short field":
                file["energy"].resize(1, axis=0)
            elif how == "lost field":
                del file["positions"]
            elif how == "other units":
                metadata = json.loads(file["metadata"][()])
                metadata["units"]["energy"] = "hartree"
                file["metadata"][()] = json.dumps(metadata)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "no such frame store"),
        ("empty", "is empty"),
        ("text", "cannot be read as a frame store"),
        ("truncated", "cannot be read as a frame store"),
        ("foreign", "not a frame store of this project"),
        ("newer", f"format version {FORMAT_VERSION + 1}, this package reads up to {FORMAT_VERSION}; upgrade"),
        ("short field", "fields do not fit together"),
        ("lost field", "fields do not fit together"),
        ("other units", "hartree"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, how: str, message: str) -> None:
    path = tmp_path / "bad.h5"
    write_store(path, InMemoryDataset(mixed_frames(), METADATA))
    damage(path, how)
    with pytest.raises(DataError, match=message) as caught:
        FrameStore(path)
    assert "\n" not in str(caught.value) and "bad.h5" in str(caught.value)


def test_unwritable_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be written .*check the folder"):
        StoreWriter(tmp_path / "no" / "such" / "a.h5", METADATA)


def energy_sum(store: FrameStore) -> float:
    return sum(frame.energy or 0.0 for frame in store)


@pytest.mark.parametrize("in_memory_bytes", [0, 10**9])
def test_data_loading_workers_read_the_same(tmp_path: Path, in_memory_bytes: int) -> None:
    import torch

    rng = np.random.default_rng(3)
    frames = [random_frame(rng, 2 + i % 3, energy=float(i)) for i in range(40)]
    write_store(tmp_path / "a.h5", InMemoryDataset(frames, METADATA))
    store = FrameStore(tmp_path / "a.h5", in_memory_bytes)
    assert store[7].energy == 7.0  # the parent holds the file open while the workers start
    loader = torch.utils.data.DataLoader(
        store,  # type: ignore[arg-type]
        batch_size=4,
        num_workers=2,
        collate_fn=lambda batch: [(frame.energy, frame.positions) for frame in batch],
    )
    got = [entry for batch in loader for entry in batch]
    assert [energy for energy, _ in got] == [float(i) for i in range(40)]
    for (_, positions), frame in zip(got, frames, strict=True):
        np.testing.assert_array_equal(positions, frame.positions)
    assert energy_sum(store) == energy_sum(pickle.loads(pickle.dumps(store)))


def test_open_dataset_knows_the_ending(tmp_path: Path) -> None:
    write_store(tmp_path / "a.h5", InMemoryDataset(mixed_frames(), METADATA))
    assert isinstance(open_dataset(tmp_path / "a.h5"), FrameStore)
