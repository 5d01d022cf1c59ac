"""The TorchScript file for OpenMM-Torch, loaded with torch alone and called as ``TorchForce`` calls it."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from ffpretrain import FFCalculator, cli, list_models, load_potential
from ffpretrain.artifacts import file_sha256
from ffpretrain.errors import ConfigError, UnsupportedInputError
from ffpretrain.heads import VectorHead
from ffpretrain.md import export
from ffpretrain.md.agreement import AgreementError
from ffpretrain.md.export import export_torch_force
from ffpretrain.objectives.fields import DenoisingField
from ffpretrain.potential import Potential
from ffpretrain.units import KJ_PER_MOL

Build = Callable[..., Potential]
Result = tuple[float, np.ndarray]
#: reduced box vectors in Å, narrow enough that every atom sees images of the others
CELL = 10.3 * np.array([[1.0, 0.0, 0.0], [0.3, 1.0, 0.0], [-0.4, 0.2, 1.0]])


def load(path: Path) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(path)


def called(module: Any, positions: np.ndarray, cell: np.ndarray | None = None) -> Result:
    """Energy in kJ/mol and forces in kJ/mol/nm, by the steps of TorchForce's kernel; positions in Å.

    It hands over float64 tensors in nm (on a CPU), asks for the gradient of the positions unless the module
    gives forces, and differentiates the energy that comes back.
    """
    pos = torch.tensor(positions / 10, dtype=torch.float64, requires_grad=True)
    inputs = [pos] if cell is None else [pos, torch.tensor(cell / 10, dtype=torch.float64)]
    energy = module(*inputs)
    assert energy.shape == () and energy.dtype == torch.float64
    energy.backward()
    assert pos.grad is not None
    return energy.item(), -pos.grad.numpy()


def by_openmm(model: Any, atoms: Atoms) -> Result:
    """The same from the PythonForce in float64."""
    openmm = pytest.importorskip("openmm")
    from ffpretrain.md.openmm import add_force

    system = openmm.System()
    for mass in atoms.get_masses():
        system.addParticle(mass)
    if atoms.pbc.any():
        system.setDefaultPeriodicBoxVectors(*(atoms.cell.array / 10))
    add_force(system, model, atoms.numbers, periodic=bool(atoms.pbc.any()), device="cpu", dtype="float64")
    return in_context(system, atoms)


def in_context(system: Any, atoms: Atoms) -> Result:
    import openmm

    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(atoms.positions / 10)
    state = context.getState(energy=True, forces=True)
    return state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value


def agree(found: Result, wanted: Result) -> None:
    assert found[0] == pytest.approx(wanted[0], abs=1e-4, rel=0)
    np.testing.assert_allclose(found[1], wanted[1], rtol=0, atol=1e-4)


def moved(atoms: Atoms) -> Atoms:
    atoms = atoms.copy()
    atoms.rattle(0.1, seed=3)
    return atoms


def periodic(atoms: Atoms) -> Atoms:
    """Drawn out, so that it reaches from one face of the box to the other."""
    atoms = moved(atoms)
    atoms.positions *= 2
    atoms.set_cell(CELL)
    atoms.pbc = True
    return atoms


# --- the numbers


@pytest.mark.parametrize("name", ["ndem-aspirin", "ndem-ethanol"])
def test_named_models(name: str, tmp_path: Path) -> None:
    if name not in list_models():
        pytest.skip(f"{name} is not in this package")
    written = export_torch_force(name, tmp_path / "deep" / "model.pt")
    atoms = moved(load_potential(name).card.reference_geometry.to_atoms())
    assert written.numbers == atoms.numbers.tolist()
    agree(called(load(written.path), atoms.positions), by_openmm(name, atoms))


@pytest.mark.parametrize(
    ("backbone", "options"),
    [("torchmd-et", {}), ("torchmd-et", {"vector_cutoff": False}), ("painn", {"hidden": 16, "layers": 2})],
)
def test_vacuum_and_box(
    build_potential: Build, ethanol: Atoms, tmp_path: Path, backbone: str, options: dict[str, Any]
) -> None:
    potential = build_potential(name=backbone, **options)
    module = load(export_torch_force(potential, tmp_path / "m.pt", ethanol.numbers).path)
    agree(called(module, moved(ethanol).positions), by_openmm(potential, moved(ethanol)))
    boxed = periodic(ethanol)
    wanted = by_openmm(potential, boxed)
    alone = boxed.copy()
    alone.pbc = False
    assert abs(wanted[0] - by_openmm(potential, alone)[0]) > 0.1
    agree(called(module, boxed.positions, CELL), wanted)
    outside = boxed.positions + np.random.default_rng(0).integers(-2, 3, (9, 3)) @ CELL
    agree(called(module, outside, CELL), wanted)


def test_more_atoms_than_all_pairs_are_kept_of(build_potential: Build, tmp_path: Path) -> None:
    potential, crowd = build_potential(cutoff=3.0), molecule("CH3CH2OH")
    for k in range(1, 8):
        other = molecule("CH3CH2OH")
        other.translate([4.0 * (k % 2), 4.0 * (k // 2 % 2), 4.0 * (k // 4)])
        crowd += other
    module = load(export_torch_force(potential, tmp_path / "m.pt", crowd.numbers).path)
    crowd = moved(crowd)
    assert len(crowd) == 72 > export.DENSE_ATOMS
    agree(called(module, crowd.positions), by_openmm(potential, crowd))


def test_float32_positions_are_evaluated_in_float64(
    potential: Potential, ethanol: Atoms, tmp_path: Path
) -> None:
    """As OpenMM's CUDA platform gives them; in nm they are off by up to 2e-8."""
    module = load(export_torch_force(potential, tmp_path / "m.pt", ethanol.numbers).path)
    single = torch.tensor(ethanol.positions / 10, dtype=torch.float32, requires_grad=True)
    energy = module(single)
    energy.backward()
    assert energy.dtype == torch.float64 and single.grad.dtype == torch.float32
    rounded = single.detach().numpy().astype(np.float64) * 10
    wanted, forces = called(module, rounded)
    assert energy.item() == pytest.approx(wanted, abs=1e-7, rel=0)
    np.testing.assert_allclose(-single.grad.numpy(), forces, rtol=1e-5, atol=1e-3)


def test_nothing_is_tied_to_a_device(build_potential: Build, ethanol: Atoms, tmp_path: Path) -> None:
    """The tracer writes devices into the code; there a module that is moved to a GPU would fail."""
    for options in ({}, {"vector_cutoff": False}):
        potential = build_potential(**options)
        module = load(
            export_torch_force(
                potential,
                tmp_path / "m.pt",
                ethanol.numbers,
            ).path
        )
        code = str(module.inlined_graph)
        assert "Device = prim::device" in code
        assert "Device = prim::Constant" not in code
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(lambda x: x + torch.zeros(1, device=x.device), torch.ones(1))
    assert "Device = prim::Constant" in str(traced.graph), "the tracer no longer writes devices"


def test_it_can_be_frozen(potential: Potential, ethanol: Atoms, tmp_path: Path) -> None:
    """TorchForce's kernels may inline a module's attributes."""
    module = load(export_torch_force(potential, tmp_path / "m.pt", ethanol.numbers).path)
    wanted = called(module, ethanol.positions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        frozen = torch.jit.freeze(module.eval())
    agree(called(frozen, ethanol.positions), wanted)


def test_torch_force_itself(potential: Potential, ethanol: Atoms, tmp_path: Path) -> None:
    openmm = pytest.importorskip("openmm")
    reason = "OpenMM-Torch is absent or made for another torch: its wheels need CUDA"
    torch_force = pytest.importorskip("openmmtorch", reason=reason, exc_type=ImportError).TorchForce
    path = export_torch_force(potential, tmp_path / "m.pt", ethanol.numbers).path
    for atoms in (moved(ethanol), periodic(ethanol)):
        system, force = openmm.System(), torch_force(str(path))
        for mass in atoms.get_masses():
            system.addParticle(mass)
        if atoms.pbc.any():
            system.setDefaultPeriodicBoxVectors(*(CELL / 10))
            force.setUsesPeriodicBoundaryConditions(True)
        system.addForce(force)
        agree(in_context(system, atoms), by_openmm(potential, atoms))


# --- the file


def test_it_says_what_it_is(model_file: Path, tmp_path: Path) -> None:
    path = export_torch_force(model_file, str(tmp_path / "m.pt")).path
    said = {"ffpretrain.json": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.load(path, _extra_files=said)
    origin = json.loads(said["ffpretrain.json"])
    assert origin["model"] == "tiny" and origin["sha256"] == file_sha256(model_file)
    assert origin["numbers"] == molecule("CH3CH2OH").numbers.tolist()
    assert origin["units"] == {"positions": "nm", "boxvectors": "nm", "energy": "kJ/mol"}


def test_it_needs_torch_only(potential: Potential, ethanol: Atoms, tmp_path: Path) -> None:
    path = export_torch_force(potential, tmp_path / "m.pt", ethanol.numbers).path
    np.save(tmp_path / "positions.npy", ethanol.positions / 10)
    code = (
        "import sys, torch, numpy as np\n"
        f"module = torch.jit.load({str(path)!r})\n"
        f"print(module(torch.tensor(np.load({str(tmp_path / 'positions.npy')!r}))).item())\n"
        "print([name for name in sys.modules if name.startswith('ffpretrain')])"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split(
        "\n"
    )
    ethanol.calc = FFCalculator(potential, device="cpu", dtype="float64")
    assert float(lines[0]) * KJ_PER_MOL == pytest.approx(ethanol.get_potential_energy(), abs=1e-8, rel=0)
    assert lines[1] == "[]"


def test_a_module_that_disagrees_is_not_written(
    potential: Potential, ethanol: Atoms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_total", lambda energies, _: energies.sum() / (1.00001 * KJ_PER_MOL))
    with pytest.raises(AgreementError, match=r"'torch-force' \(float64\) does not reproduce"):
        export_torch_force(potential, tmp_path / "m.pt", ethanol.numbers)
    assert list(tmp_path.iterdir()) == []


# --- what users get wrong


def test_the_wrong_number_of_particles(potential: Potential, ethanol: Atoms, tmp_path: Path) -> None:
    module = load(export_torch_force(potential, tmp_path / "m.pt", ethanol.numbers).path)
    with pytest.raises(Exception, match="is for 9 atoms and the System has 8 particles"):
        called(module, ethanol.positions[:8])


def test_a_narrow_box(potential: Potential, ethanol: Atoms, tmp_path: Path) -> None:
    module = load(export_torch_force(potential, tmp_path / "m.pt", ethanol.numbers).path)
    with pytest.raises(Exception, match=r"the box is 0\.98\d+ nm wide; this ffpretrain file needs 1\. nm"):
        called(module, ethanol.positions, np.diag([12.0, 9.9, 12.0]))


def test_what_cannot_be_exported(
    potential: Potential, with_card: Callable[..., Potential], tmp_path: Path
) -> None:
    path = tmp_path / "m.pt"
    with pytest.raises(ConfigError, match="names no molecule; give the atomic numbers"):
        export_torch_force(potential, path)
    with pytest.raises(UnsupportedInputError, match="not trained on N"):
        export_torch_force(potential, path, [7])
    with pytest.raises(UnsupportedInputError, match="the atoms are CH4, but 'tiny' was trained on C2H6O"):
        export_torch_force(with_card(), path, [6, 1, 1, 1, 1])
    with pytest.raises(UnsupportedInputError, match=r"501 atoms are too many.*add_force"):
        export_torch_force(potential, path, [6] * 501)
    with pytest.raises(UnsupportedInputError, match="whole numbers"):
        export_torch_force(potential, path, [])
    with pytest.raises(ConfigError, match=r"only a Potential can be written.*DenoisingField"):
        export_torch_force(DenoisingField(potential, VectorHead(16), 1.0), path, [6])
    assert not path.exists()


# --- the command


def command(*words: object) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", *map(str, words)])
    return caught.value.code


def test_the_command(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, words = tmp_path / "m.pt", ("--to", "openmm-torch", "--out", tmp_path / "m.pt")
    assert command(model_file, *words) == 0
    assert f"{out}: 9 atoms" in capsys.readouterr().out
    numbers = "8, 1,1,1,1,1,1,6,6"
    assert command(model_file, *words, "--numbers", numbers, "--overwrite", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["schema"], answer["version"], answer["to"]) == ("ffpretrain-export", 1, "openmm-torch")
    assert answer["numbers"] == [8, 1, 1, 1, 1, 1, 1, 6, 6] and answer["bytes"] == out.stat().st_size
    assert answer["units"]["energy"] == "kJ/mol"
    assert [found["path"] for found in answer["agreement"]] == ["torch-force", "torch-force periodic"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{model}", "--to", "openmm-torch", "--out", "there.pt"], "there.pt: exists; choose another name"),
        (["{model}", "--to", "openmm-torch", "--out", "there.pt/m.pt"], "there.pt/m.pt: cannot be written"),
        (["{model}", "--to", "openmm-torch", "--out", "m.pt", "--numbers", "8,H"], "give atomic numbers"),
        (["{model}", "--to", "openmm-torch", "--out", "m.pt", "--numbers", "7"], "not trained on N"),
        (["ndem-asprin", "--to", "openmm-torch", "--out", "m.pt"], "no model is called 'ndem-asprin'"),
        (["{model}", "--to", "openm", "--out", "m.pt"], "--to"),
    ],
)
def test_bad_words(
    model_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.pt").write_bytes(b"kept")
    assert command(*(word.replace("{model}", str(model_file)) for word in words)) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err
    assert Path("there.pt").read_bytes() == b"kept" and not Path("m.pt").exists()
