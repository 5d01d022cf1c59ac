"""Model files: bitwise round trips, cards, formats old and new, and every way a file can be wrong."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from ffpretrain import load_potential
from ffpretrain.artifacts import (
    FORMAT_VERSION,
    MeasuredErrors,
    ModelCard,
    Quantity,
    ReferenceGeometry,
    TrainingData,
    file_sha256,
    make_card,
    parse_card,
    read_card,
    resolve_device,
    save_potential,
)
from ffpretrain.backbones import create_backbone, list_backbones
from ffpretrain.errors import ArtifactError, ConfigError, UserError
from ffpretrain.graphs import Graph, build_graph
from ffpretrain.heads import VectorHead
from ffpretrain.potential import Potential

DATA = Path(__file__).parent / "data"
WATER = [[0.0, 0.0, 0.1173], [0.0, 0.7572, -0.4692], [0.0, -0.7572, -0.4692]]
REFERENCE = {1: -13.605693122994, 8: -17600.123456789012}


def tiny(backbone: str = "torchmd-et", seed: int = 1, **options: Any) -> Potential:
    """A small potential with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = create_backbone(backbone, **{"hidden": 16, "layers": 1, "max_z": 20, **options})
        return Potential(network, scale=1 / 3, shift=0.1, reference_energies=REFERENCE)


def water() -> Graph:
    return build_graph(torch.tensor([8, 1, 1]), torch.tensor(WATER, dtype=torch.float64), 5.0)


def full_card(potential: Potential) -> ModelCard:
    return make_card(
        potential,
        "tiny-water",
        description="nothing",
        training_data=[TrainingData(name="w", sha256={"w.npz": "0" * 64}, n_train=950)],
        compositions=["H2O"],
        min_distance=0.1 + 0.2,
        objective={"name": "ndem", "options": {"weight": 0.01}},
        recipe={"trainer": {"max_steps": 3}, "list": [1, 2.5, None, "x"]},
        reference_geometry=ReferenceGeometry(
            numbers=[8, 1, 1], positions=[(a, b, c) for a, b, c in WATER], name="water"
        ),
        errors={
            "test": MeasuredErrors(
                dataset="w", n_frames=9, quantities={"forces_mae": Quantity(value=1 / 7, unit="eV/angstrom")}
            )
        },
        agreement={"openmm": 1e-7},
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A whole model file."""
    potential = tiny()
    return save_potential(potential, tmp_path / "good" / "model.safetensors", full_card(potential))


def parts(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a file, without the checksum, which a changed copy would not match."""
    blob = path.read_bytes()
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    metadata = header["__metadata__"]
    return safetensors.torch.load(blob), {key: metadata[key] for key in metadata if key != "sha256"}


def forge(path: Path, target: Path, *, drop: tuple[str, ...] = (), **card: Any) -> Path:
    """Copy a model file, changing and dropping fields of its card."""
    tensors, metadata = parts(path)
    raw = {**json.loads(metadata["card"]), **card}
    content = json.dumps({key: value for key, value in raw.items() if key not in drop})
    safetensors.torch.save_file(tensors, target, {**metadata, "card": content})
    return target


def refused(path: str | Path, *words: str) -> str:
    """Check that a model is refused in one line that has the words, by load_potential; return the line."""
    with pytest.raises(ArtifactError) as caught:
        load_potential(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


# round trips


@pytest.mark.parametrize("backbone", list_backbones())
def test_round_trip_is_bitwise(backbone: str, tmp_path: Path) -> None:
    potential = tiny(backbone).eval()
    card = full_card(potential)
    loaded = load_potential(save_potential(potential, tmp_path / "m.safetensors", card))
    assert loaded.card == card
    before, after = potential.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    for name, tensor in potential(water()).items():
        assert torch.equal(tensor, loaded(water())[name]), name


def test_loaded_potential_is_for_use_unless_trainable(saved: Path) -> None:
    fixed, trainable = load_potential(saved), load_potential(saved, trainable=True)
    assert not fixed.training and not trainable.training
    assert not any(p.requires_grad for p in fixed.parameters())
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, p in tiny().named_parameters() if p.requires_grad
    }
    frozen = tiny(trainable_rbf=False)
    path = save_potential(frozen, saved.with_name("frozen.safetensors"), full_card(frozen))
    again = load_potential(path, trainable=True)
    assert not dict(again.named_parameters())["backbone.basis.means"].requires_grad


@pytest.mark.parametrize("dtype", ["float64", torch.float64])
def test_float64_casts_the_stored_weights(saved: Path, dtype: Any) -> None:
    loaded = load_potential(saved, dtype=dtype)
    assert loaded.dtype == torch.float64
    expected = tiny().double().eval()(water())
    got = loaded(water())
    assert abs(expected["energy"] - got["energy"]).item() < 1e-12 * abs(expected["energy"]).item()
    # network part alone, which the reference energies do not hide
    reference = sum(REFERENCE[z] for z in (8, 1, 1))
    assert abs((expected["energy"] - reference) - (got["energy"] - reference)).item() <= 1e-12
    assert torch.allclose(expected["forces"], got["forces"], rtol=0, atol=1e-12)


def test_reference_energies_scale_and_shift_are_exact(saved: Path) -> None:
    loaded = load_potential(saved, dtype="float32")
    assert loaded.reference[8].item() == REFERENCE[8]
    assert loaded.scale.item() == 1 / 3 and loaded.shift.item() == 0.1
    card = read_card(saved)
    assert card.reference_energies == REFERENCE
    assert (card.energy_scale, card.energy_shift, card.elements) == (1 / 3, 0.1, [1, 8])
    assert card.min_distance == 0.1 + 0.2
    assert card.reference_geometry is not None
    atoms = card.reference_geometry.to_atoms()
    assert atoms.get_chemical_formula() == "H2O" and atoms.positions.tolist() == WATER


def test_float64_weights_stay_float64(tmp_path: Path) -> None:
    potential = tiny().double()
    nn.init.constant_(potential.head.second.out.weight, 1 / 3)  # type: ignore[union-attr, arg-type]
    path = save_potential(potential, tmp_path / "m.safetensors", full_card(potential))
    assert load_potential(path).dtype == torch.float64
    assert torch.equal(load_potential(path).head.second.out.weight, potential.head.second.out.weight)  # type: ignore[union-attr, arg-type]
    assert load_potential(path, dtype="float32").dtype == torch.float32


def test_saving_what_was_loaded_gives_the_same_bytes(saved: Path) -> None:
    loaded = load_potential(saved)
    assert loaded.card is not None
    again = save_potential(loaded, saved.with_name("again.safetensors"), loaded.card)
    assert again.read_bytes() == saved.read_bytes()
    assert file_sha256(again) == file_sha256(saved)


def test_bytes_are_the_same_in_another_process_and_cards_need_no_torch(saved: Path) -> None:
    other = saved.with_name("other.safetensors")
    code = (
        "import sys\n"
        "from ffpretrain import list_models\n"
        "from ffpretrain.artifacts import read_card\n"
        f"card = read_card({str(saved)!r}); list_models()\n"
        "assert card.name == 'tiny-water'\n"
        "assert not {'torch', 'safetensors', 'numpy', 'ase'} & set(sys.modules), 'heavy'\n"
        "from ffpretrain.artifacts import load_potential, save_potential\n"
        f"save_potential(load_potential({str(saved)!r}), {str(other)!r}, card)\n"
    )
    env = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert other.read_bytes() == saved.read_bytes()


def test_loading_leaves_random_numbers_and_defaults_alone(saved: Path) -> None:
    state = torch.random.get_rng_state()
    load_potential(saved)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.set_default_dtype(torch.float64)
    try:
        loaded = load_potential(saved)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert loaded.dtype == torch.float32
    for name, tensor in load_potential(saved).state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_a_potential_is_returned_itself_or_copied() -> None:
    potential = tiny().eval()
    assert load_potential(potential) is potential
    assert load_potential(potential, dtype="float32") is potential
    double = load_potential(potential, dtype="float64")
    assert double.dtype == torch.float64 and potential.dtype == torch.float32
    assert double.scale.dtype == torch.float64
    potential.train()
    copied = load_potential(potential)
    assert copied is not potential and potential.training and not copied.training


# formats


@pytest.mark.parametrize("version", range(FORMAT_VERSION + 1))
def test_kept_files_of_every_format_are_read(version: int) -> None:
    # energy and forces were recorded when the files were written
    potential = load_potential(DATA / f"format{version}.safetensors", dtype="float64")
    card = potential.card
    assert card is not None
    assert card.format_version == FORMAT_VERSION
    assert (card.name, card.charges, card.spins) == ("sample-water", [0], [1])
    assert card.backbone.name == "torchmd-et" and card.backbone.options["layers"] == 2
    assert card.energy_scale == 1.0371 and card.training_data[0].n_train == 1
    out = potential(water())
    assert out["energy"].item() == pytest.approx(-2069.1327490028193, abs=1e-10)
    assert out["forces"][1].tolist() == pytest.approx(
        [0.0, 0.3135498061549984, 0.07648582262716316], abs=1e-12
    )


def test_the_sample_of_format_0_is_of_format_0() -> None:
    raw = json.loads(parts(DATA / "format0.safetensors")[1]["card"])
    assert raw["format_version"] == 0 and raw["backbone"] == "torchmd-et" and "energy_scale" not in raw


def test_the_sample_of_format_1_knows_no_fields() -> None:
    raw = json.loads(parts(DATA / "format1.safetensors")[1]["card"])
    assert raw["format_version"] == 1 and raw["kind"] == "potential" and "force_scale" not in raw


def test_newer_format_is_a_clear_error(saved: Path, tmp_path: Path) -> None:
    newer = forge(saved, tmp_path / "n.safetensors", format_version=FORMAT_VERSION + 1, novel={"a": 1})
    refused(newer, str(newer), "newer ffpretrain", "pip install -U ffpretrain")
    with pytest.raises(ArtifactError, match="newer ffpretrain"):
        read_card(newer)


@pytest.mark.parametrize("version", ["1", -1, None, 1.5, True])
def test_nonsense_format_version_is_refused(version: Any, saved: Path, tmp_path: Path) -> None:
    refused(forge(saved, tmp_path / "n.safetensors", format_version=version), "format_version", "damaged")


def test_missing_format_version_is_refused(saved: Path, tmp_path: Path) -> None:
    refused(forge(saved, tmp_path / "n.safetensors", drop=("format_version",)), "format_version")


def test_pretrained_weights_are_only_for_training(tmp_path: Path) -> None:
    potential = tiny()
    path = save_potential(potential, tmp_path / "p.safetensors", make_card(potential, "p", kind="pretrained"))
    refused(path, "no energy yet", f"ffpretrain train RECIPE model.pretrained={path}")
    loaded = load_potential(path, trainable=True)
    assert loaded.card is not None and loaded.card.kind == "pretrained"
    assert torch.equal(loaded.eval().features(water()).scalars, potential.features(water()).scalars)


# files that are no model


def test_missing_file_folder_and_unknown_name(saved: Path, tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "none.safetensors", "no such model file")
    refused("some/where", "some/where", "no such model file")
    refused("nothing.pt", "nothing.pt", "no such model file")
    refused("tiny-watr", "'tiny-watr'")
    refused(saved.parent, "is a folder", f"give {saved}")
    refused(tmp_path, "is a folder", "give a .safetensors file")
    with pytest.raises(ArtifactError, match="by name or path, not as list"):
        load_potential([str(saved)])  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="no such model file"):
        file_sha256(tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "truncated (0 of"),
        (b"abc", "truncated (3 of"),
        (b"# a text file that somebody renamed\n" * 9, "is not a .safetensors model file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(500), "is not a .safetensors model file"),
        ((50).to_bytes(8, "little") + b"{" * 50, "header is damaged"),
        ((50).to_bytes(8, "little") + b"{\xff" * 25, "header is damaged"),
        ((20000).to_bytes(8, "little") + b'{"a":' * 4000, "header is damaged"),
        ((2).to_bytes(8, "little") + b"{}", "no ffpretrain model card"),
        ((50).to_bytes(8, "little") + b'{"w":{"data_offsets":[0,"x"]}}' + b" " * 20, "header is damaged"),
    ],
)
def test_other_content_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    refused(path, str(path), words)
    with pytest.raises(ArtifactError):
        read_card(path)


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "ckpt", "pkl"])
@pytest.mark.parametrize("kind", ["pickle", "torch", "legacy torch"])
def test_pickles_are_refused_and_not_executed(kind: str, suffix: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "executed", tmp_path / f"model.{suffix}"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(str(mark))))
    else:
        torch.save(Payload(str(mark)), path, _use_new_zipfile_serialization=kind == "torch")
    refused(path, str(path), "runs code", ".safetensors")
    with pytest.raises(ArtifactError, match="runs code"):
        read_card(path)
    assert not mark.exists()
    # the payload is live: what was avoided would have happened
    if kind == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path.rename(tmp_path / "payload.pt"), weights_only=False)
    assert mark.is_dir()


def test_pickle_behind_a_plausible_header_is_refused(saved: Path, tmp_path: Path) -> None:
    mark, path = tmp_path / "executed", tmp_path / "m.safetensors"
    path.write_bytes(saved.read_bytes() + pickle.dumps(Payload(str(mark))))
    refused(path, "checksum it carries")
    tensors, metadata = parts(saved)
    safetensors.torch.save_file(tensors, path, metadata)
    path.write_bytes(path.read_bytes() + pickle.dumps(Payload(str(mark))))
    refused(path, "weights are damaged")
    assert not mark.exists()


def test_truncated_at_any_length_is_refused(saved: Path, tmp_path: Path) -> None:
    blob = saved.read_bytes()
    header = 8 + int.from_bytes(blob[:8], "little")
    path = tmp_path / "m.safetensors"
    for length in [0, 1, 7, 8, 9, 100, header - 1, header, header + 1, len(blob) // 2, len(blob) - 1]:
        path.write_bytes(blob[:length])
        refused(path, str(path), f"truncated ({length} of")


def test_damage_anywhere_is_found(saved: Path, tmp_path: Path) -> None:
    original = load_potential(saved)
    blob, generator, path = saved.read_bytes(), random.Random(3), tmp_path / "m.safetensors"
    header = 8 + int.from_bytes(blob[:8], "little")
    n_refused = 0
    for i in range(200):
        damaged = bytearray(blob)
        for _ in range(generator.choice([1, 1, 4])):
            place = generator.randrange(header) if i % 4 else generator.randrange(header, len(blob))
            damaged[place] ^= generator.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            loaded = load_potential(path)
        except ArtifactError as error:
            assert str(error).isprintable()
            n_refused += 1
            continue
        # the damage hit the padding or the name of the checksum
        assert loaded.card == original.card
        for name, tensor in original.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name])
    assert n_refused > 190


def test_safetensors_without_a_card_is_refused(saved: Path, tmp_path: Path) -> None:
    tensors, metadata = parts(saved)
    path = tmp_path / "m.safetensors"
    for kept in ({}, {"format": "pt"}, {"format": "ffpretrain"}, {"card": metadata["card"]}):
        safetensors.torch.save_file(tensors, path, kept)
        refused(path, str(path), "no ffpretrain model card")
    for card in ("", "{", "[]", "null", '{"name": 1}'):
        safetensors.torch.save_file(tensors, path, {**metadata, "card": card})
        refused(path, str(path), "damaged")


# cards that do not fit


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cutof": 5.0}, "unknown field 'cutof'; did you mean 'cutoff'?"),
        ({"training": {"step": 1}}, "unknown field 'training.step'; did you mean 'steps'"),
        ({"cutoff": "wide"}, "cutoff: "),
        ({"cutoff": float("nan")}, "cutoff: "),
        ({"units": {"energy": "kcal/mol"}}, "units.energy: "),
        ({"elements": []}, "elements: "),
        ({"kind": "dream"}, "kind: "),
        ({"kind": "field"}, "kind 'field' does not go with force_scale None"),
        ({"force_scale": 1.0}, "kind 'potential' does not go with force_scale 1.0"),
        (
            {"kind": "field", "force_scale": 1.0},
            "kind 'field' and head 'energy'; the file contradicts itself",
        ),
        ({"reference_energies": {"O": 1.0}}, "reference_energies"),
        ({"reference_geometry": {"numbers": [1], "positions": []}}, "1 atomic numbers but 0 positions"),
        (
            {"reference_geometry": {"numbers": [1], "positions": [[0, 0, 0]], "pbc": [1, 0, 0]}},
            "needs a cell",
        ),
        ({"backbone": {"name": "torchmd-e"}}, "unknown backbone 'torchmd-e'; did you mean 'torchmd-et'?"),
        ({"backbone": {"name": "torchmd-et", "options": {"hiden": 1}}}, "no option 'hiden'"),
        ({"backbone": {"name": "torchmd-et", "options": {"hidden": "big"}}}, "network"),
        ({"backbone": {"name": "torchmd-et", "options": {"hidden": 16, "rbf": -3}}}, "network"),
        ({"backbone": {"name": "torchmd-et", "options": {"name": "x"}}}, "network"),
        ({"head": {"name": "dipole"}}, "unknown head 'dipole'"),
        ({"head": {"name": "energy", "options": {"size": 1}}}, "network"),
        ({"cutoff": 4.0}, "cutoff 4.0 and the backbone has 5.0"),
        ({"elements": [1, 92]}, "92"),
        ({"reference_energies": {"92": 1.0}}, "92"),
    ],
)
def test_cards_that_do_not_fit_are_refused(
    change: dict[str, Any], words: str, saved: Path, tmp_path: Path
) -> None:
    path = forge(saved, tmp_path / "m.safetensors", **change)
    refused(path, str(path), words)


def test_missing_field_is_named(saved: Path, tmp_path: Path) -> None:
    refused(forge(saved, tmp_path / "m.safetensors", drop=("backbone",)), "field 'backbone' is missing")


def test_making_a_card_checks_its_fields() -> None:
    potential = tiny()
    with pytest.raises(ArtifactError, match=r"card of 'x': .*'licens'; did you mean 'licence'"):
        make_card(potential, "x", licens="MIT")
    with pytest.raises(ArtifactError, match="cutoff is taken from the potential"):
        make_card(potential, "x", cutoff=3.0)
    with pytest.raises(ArtifactError, match="and 4 more"):
        parse_card({"name": "", "a": 1, "b": 2, "d": 3}, "here")
    with pytest.raises(ArtifactError, match="NaN or infinite"):
        make_card(potential, "x").model_copy(update={"agreement": {"a": float("nan")}}).to_json()


# weights that do not fit


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, saved: Path, tmp_path: Path) -> None:
    tensors, metadata = parts(saved)
    tensors["head.second.out.bias"][0] = value
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(tensors, path, metadata)
    refused(path, "NaN or infinite in: head.second.out.bias")
    potential = tiny()
    nn.init.constant_(potential.head.second.out.bias, value)  # type: ignore[union-attr, arg-type]
    with pytest.raises(ArtifactError, match=r"head\.second\.out\.bias"):
        save_potential(potential, tmp_path / "new.safetensors", full_card(potential))
    assert not (tmp_path / "new.safetensors").exists()


def test_tensors_that_do_not_fit_are_listed(saved: Path, tmp_path: Path) -> None:
    tensors, metadata = parts(saved)
    path = tmp_path / "m.safetensors"

    def changed(**changes: Tensor | None) -> Path:
        kept = {**tensors, **{key.replace("__", "."): value for key, value in changes.items()}}
        kept = {key: value for key, value in kept.items() if value is not None}
        safetensors.torch.save_file(kept, path, metadata)
        return path

    refused(changed(head__second__out__bias=None), "missing: head.second.out.bias")
    refused(changed(head__extra=torch.zeros(2)), "unexpected: head.extra")
    refused(changed(head__second__out__bias=torch.zeros(7)), "another shape or type: head.second.out.bias")
    refused(changed(head__second__out__bias=torch.zeros(1, dtype=torch.int64)), "another shape or type")
    refused(
        changed(head__second__out__bias=torch.zeros(1, dtype=torch.float64)), "all float32 or all float64"
    )
    safetensors.torch.save_file({k: v.half() for k, v in tensors.items()}, path, metadata)
    refused(path, "found float16")
    safetensors.torch.save_file({}, path, metadata)
    refused(path, "missing: ", " more")


# devices and precisions


def test_absent_or_unknown_device(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, words in {
        "cuda": "no CUDA GPU",
        "cuda:1": "no CUDA GPU",
        "mps": "not supported",
        "meta": "not supported",
        "gpu": "unknown device 'gpu'",
    }.items():
        with pytest.raises(ConfigError, match=words):
            load_potential(saved, device=device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="finds only 1 CUDA GPU here"):
        resolve_device("cuda:1")
    assert resolve_device("auto").type == "cuda"


@pytest.mark.parametrize("dtype", ["float16", "double", torch.float16, 64])
def test_unknown_precision(saved: Path, dtype: Any) -> None:
    with pytest.raises(ConfigError, match="'float32' or 'float64'"):
        load_potential(saved, dtype=dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_cuda_round_trip(saved: Path, tmp_path: Path) -> None:
    loaded = load_potential(saved, device="cuda", dtype="float64")
    assert loaded.scale.device.type == loaded.reference.device.type == "cuda"
    assert load_potential(loaded, device="cuda") is loaded
    expected, got = tiny().double().eval()(water()), loaded(water().to("cuda"))
    assert torch.allclose(expected["forces"], got["forces"].cpu(), rtol=0, atol=1e-10)
    on_gpu = load_potential(saved, device="cuda")
    again = save_potential(on_gpu, tmp_path / "m.safetensors", full_card(on_gpu))
    assert again.read_bytes() == saved.read_bytes()


# writing


class Derived(Potential):
    """A potential that a file could not rebuild."""


def test_what_no_file_could_rebuild_is_not_saved(tmp_path: Path) -> None:
    potential, path = tiny(), tmp_path / "m.safetensors"
    card = full_card(potential)
    derived = Derived(potential.backbone, potential.head, reference_energies=REFERENCE)
    with pytest.raises(ArtifactError, match="not Derived"):
        save_potential(derived, path, card)
    other_head = Potential(potential.backbone, VectorHead(16), reference_energies=REFERENCE)  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="VectorHead cannot be saved"):
        save_potential(other_head, path, card)
    foreign = type("Foreign", (type(potential.backbone),), {})(hidden=16, layers=1, heads=2)
    with pytest.raises(ArtifactError, match="Foreign has no name in the registry"):
        save_potential(Potential(foreign), path, card)
    potential.backbone.config["hidden"] = np.float32(16)
    with pytest.raises(ArtifactError, match="options of backbone 'torchmd-et' cannot be written"):
        save_potential(potential, path, card)
    with pytest.raises(ArtifactError, match=r"ends in \.safetensors"):
        save_potential(tiny(), tmp_path / "model", card)
    assert list(tmp_path.iterdir()) == []


def test_mixed_precision_is_not_saved(tmp_path: Path) -> None:
    potential = tiny()
    potential.head.double()
    with pytest.raises(ArtifactError, match="found float32, float64"):
        save_potential(potential, tmp_path / "m.safetensors", full_card(tiny()))


def test_the_network_fields_are_written_as_the_potential_has_them(tmp_path: Path) -> None:
    card = full_card(tiny())
    with torch.random.fork_rng(devices=[]):
        other = Potential(create_backbone("torchmd-et", hidden=8, layers=1, heads=2, cutoff=4.0), scale=2.0)
    path = save_potential(other, tmp_path / "m.safetensors", card)
    written = read_card(path)
    assert (written.cutoff, written.energy_scale, written.backbone.options["hidden"]) == (4.0, 2.0, 8)
    assert written.recipe == card.recipe


def test_unwritable_place_leaves_nothing_behind(saved: Path, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("x")
    with pytest.raises(ArtifactError, match="cannot be written"):
        save_potential(tiny(), blocker / "m.safetensors", full_card(tiny()))
    assert blocker.read_text() == "x"


def test_a_failed_write_keeps_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = saved.read_bytes()

    def full_disk(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        save_potential(tiny(seed=2), saved, full_card(tiny()))
    assert saved.read_bytes() == old
    assert list(saved.parent.iterdir()) == [saved]
