"""openmm-ml: the entry points, mixed systems and interpolation; and the force field of the example."""

from __future__ import annotations

import copy
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from ase import Atoms

openmm = pytest.importorskip("openmm")
openmmml = pytest.importorskip("openmmml")
from openmm import app, unit  # noqa: E402

from ffpretrain import FFCalculator, list_models  # noqa: E402
from ffpretrain.artifacts import make_card, save_potential  # noqa: E402
from ffpretrain.errors import ConfigError, UnsupportedInputError  # noqa: E402
from ffpretrain.md.openmm import add_force  # noqa: E402
from ffpretrain.potential import Potential  # noqa: E402
from ffpretrain.units import KJ_PER_MOL  # noqa: E402

ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples" / "openmm"
NAME = "ndem-aspirin"
KCAL = 4.184


class Solution(NamedTuple):
    """Aspirin in water.

    Attributes:
        topology: of all.
        nm: positions.
        aspirin: indices of its atoms.
        mm: everything under the force field.
        mixed: by openmm-ml, with the model in float64.
        model: file of an untrained potential, which the identities hold for as for any.
    """

    topology: app.Topology
    nm: np.ndarray
    aspirin: list[int]
    mm: openmm.System
    mixed: openmm.System
    model: Path


def state(system: openmm.System, nm: np.ndarray, parameters: dict[str, float] | None = None) -> openmm.State:
    made = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    made.setPositions(nm)
    for name, value in (parameters or {}).items():
        made.setParameter(name, value)
    return made.getState(energy=True, forces=True)


def energy(system: openmm.System, nm: np.ndarray, **parameters: float) -> float:
    """KJ/mol."""
    return state(system, nm, parameters).getPotentialEnergy()._value


def force_field() -> app.ForceField:
    return app.ForceField(str(DATA / "aspirin_in_water.xml"), "amber14/tip3p.xml")


def solution(model: Path, waters: int | None, method: Any, box: float | None) -> Solution:
    pdb = app.PDBFile(str(DATA / "aspirin.pdb"))
    modeller, field = app.Modeller(pdb.topology, pdb.positions), force_field()
    if box is not None:
        modeller.addSolvent(field, model="tip3p", boxSize=openmm.Vec3(box, box, box) * unit.nanometer)
    else:
        modeller.addSolvent(field, model="tip3p", numAdded=waters, padding=None)
        modeller.topology.setPeriodicBoxVectors(None)
    mm = field.createSystem(modeller.topology, nonbondedMethod=method, nonbondedCutoff=0.85)
    aspirin = [atom.index for atom in modeller.topology.atoms() if atom.residue.name == "AIN"]
    assert len(aspirin) == 21 and modeller.topology.getNumAtoms() > 100
    mixed = openmmml.MLPotential("ffpretrain", model=model, device="cpu", dtype="float64").createMixedSystem(
        modeller.topology, mm, aspirin
    )
    nm = np.array(modeller.positions.value_in_unit(unit.nanometer))
    return Solution(modeller.topology, nm, aspirin, mm, mixed, model)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, build_potential: Callable[..., Potential]) -> Path:
    """An untrained potential for aspirin on disk: openmm-ml copies systems, which needs a file."""
    potential = build_potential()
    card = make_card(potential, "tiny", compositions=["C9H8O4"])
    return save_potential(potential, tmp_path_factory.mktemp("models") / "tiny.safetensors", card)


@pytest.fixture(scope="module")
def droplet(model: Path) -> Solution:
    """In vacuum, without any cutoff."""
    return solution(model, 40, app.NoCutoff, None)


@pytest.fixture(scope="module")
def box(model: Path) -> Solution:
    """Periodic, with Ewald sums."""
    return solution(model, None, app.PME, 1.75)


def molecule_energies(model: Path, nm: np.ndarray) -> tuple[float, float]:
    """Aspirin alone in vacuum: kJ/mol of the force field, and of the model by way of ASE."""
    pdb = app.PDBFile(str(DATA / "aspirin.pdb"))
    system = force_field().createSystem(pdb.topology, nonbondedMethod=app.NoCutoff)
    atoms = Atoms([a.element.symbol for a in pdb.topology.atoms()], positions=nm * 10)
    atoms.calc = FFCalculator(model, device="cpu", dtype="float64", on_unfamiliar="ignore")
    return energy(system, nm), atoms.get_potential_energy() / KJ_PER_MOL


# --- energies


def test_a_droplet_is_mm_minus_mm_of_the_molecule_plus_the_model(droplet: Solution) -> None:
    mm_sub, ml_sub = molecule_energies(droplet.model, droplet.nm[droplet.aspirin])
    wanted = energy(droplet.mm, droplet.nm) - mm_sub + ml_sub
    assert abs(mm_sub) > 10
    assert energy(droplet.mixed, droplet.nm) == pytest.approx(wanted, abs=1e-4, rel=0)


def test_a_box_is_mm_minus_mm_of_the_molecule_plus_the_model(box: Solution) -> None:
    """The Ewald sums of both systems are equal; pairs inside aspirin beyond the cutoff are none."""
    inside = box.nm[box.aspirin]
    assert np.linalg.norm(inside[:, None] - inside, axis=-1).max() < 0.85
    mm_sub, ml_sub = molecule_energies(box.model, inside)
    wanted = energy(box.mm, box.nm) - mm_sub + ml_sub
    assert energy(box.mixed, box.nm) == pytest.approx(wanted, abs=1e-3, rel=0)


@pytest.mark.parametrize("name", ["droplet", "box"])
def test_add_force_gives_the_same(name: str, request: pytest.FixtureRequest) -> None:
    """By hand, as the documentation says: no pairs of the force field inside the molecule, plus the model."""
    given: Solution = request.getfixturevalue(name)
    system = openmm.XmlSerializer.clone(given.mm)
    nonbonded = next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    for i in given.aspirin:
        for j in given.aspirin:
            if j < i:
                nonbonded.addException(i, j, 0.0, 1.0, 0.0, True)
    numbers = [atom.element.atomic_number for atom in given.topology.atoms()]
    chosen = given.aspirin[::-1]
    periodic = given.topology.getPeriodicBoxVectors() is not None
    add_force(
        system, given.model, [numbers[i] for i in chosen], chosen, periodic, device="cpu", dtype="float64"
    )
    mine, theirs = state(system, given.nm), state(given.mixed, given.nm)
    assert mine.getPotentialEnergy()._value == pytest.approx(
        theirs.getPotentialEnergy()._value, abs=1e-5, rel=0
    )
    np.testing.assert_allclose(
        mine.getForces(asNumpy=True)._value, theirs.getForces(asNumpy=True)._value, rtol=0, atol=1e-4
    )


def test_interpolation(droplet: Solution) -> None:
    """With lambda the energy and the forces go linearly from the force field to the mixed system."""
    potential = openmmml.MLPotential("ffpretrain", model=droplet.model, device="cpu", dtype="float64")
    system = potential.createMixedSystem(droplet.topology, droplet.mm, droplet.aspirin, interpolate=True)
    ends = [state(droplet.mm, droplet.nm), state(droplet.mixed, droplet.nm)]
    e0, e1 = (end.getPotentialEnergy()._value for end in ends)
    f0, f1 = (end.getForces(asNumpy=True)._value for end in ends)
    for weight in (0.0, 0.25, 1.0):
        found = state(system, droplet.nm, {"lambda_interpolate": weight})
        wanted = (1 - weight) * e0 + weight * e1
        # OpenMM's expression holds Coulomb's constant with nine digits
        assert found.getPotentialEnergy()._value == pytest.approx(wanted, abs=1e-3, rel=0)
        np.testing.assert_allclose(
            found.getForces(asNumpy=True)._value, (1 - weight) * f0 + weight * f1, rtol=0, atol=1e-2
        )


def test_a_fragment_is_capped(droplet: Solution) -> None:
    """openmm-ml puts a hydrogen, a virtual site, where the bond to an atom outside is cut."""
    potential = openmmml.MLPotential("ffpretrain", model=droplet.model, device="cpu", dtype="float64")
    system = potential.createMixedSystem(droplet.topology, droplet.mm, droplet.aspirin[:-1])
    count = droplet.mm.getNumParticles()
    assert system.getNumParticles() == count + 1 and system.isVirtualSite(count)
    nm = np.concatenate([droplet.nm, np.zeros((1, 3))])
    made = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    made.setPositions(nm)
    made.computeVirtualSites()
    assert np.isfinite(made.getState(energy=True).getPotentialEnergy()._value)


@pytest.mark.skipif(NAME not in list_models(), reason=f"{NAME} is not in this package")
def test_a_named_model() -> None:
    pdb = app.PDBFile(str(DATA / "aspirin.pdb"))
    system = openmmml.MLPotential(f"ffpretrain-{NAME}", device="cpu").createSystem(pdb.topology)
    nm = np.array(pdb.positions.value_in_unit(unit.nanometer))
    atoms = Atoms([a.element.symbol for a in pdb.topology.atoms()], positions=nm * 10)
    atoms.calc = FFCalculator(NAME, device="cpu")
    wanted = atoms.get_potential_energy() / KJ_PER_MOL
    assert energy(system, nm) == pytest.approx(wanted, abs=1e-5 / KJ_PER_MOL, rel=0)


def test_an_ml_system(build_potential: Callable[..., Potential], ethanol: Atoms) -> None:
    """createSystem, with a potential that has no file; periodic where the topology is."""
    model, topology = build_potential(), app.Topology()
    residue = topology.addResidue("EOH", topology.addChain())
    for symbol in ethanol.get_chemical_symbols():
        topology.addAtom(symbol, app.Element.getBySymbol(symbol), residue)
    for width in (None, 8.0):
        if width is not None:
            topology.setPeriodicBoxVectors(0.1 * width * np.eye(3) * unit.nanometer)
            ethanol.set_cell([width] * 3)
            ethanol.pbc = True
        system = openmmml.MLPotential("ffpretrain", model=model, device="cpu").createSystem(
            topology, dtype="float64"
        )
        ethanol.calc = FFCalculator(model, device="cpu", dtype="float64")
        wanted = ethanol.get_potential_energy() / KJ_PER_MOL
        assert energy(system, ethanol.positions / 10) == pytest.approx(wanted, abs=1e-6, rel=0)


# --- entry points


def test_every_named_model_has_an_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["openmmml.potentials"]
    assert set(points) == {"ffpretrain", *(f"ffpretrain-{name}" for name in list_models())}
    assert set(points.values()) == {"ffpretrain.md.openmmml:PotentialFactory"}
    assert set(points) <= set(openmmml.MLPotential._implFactories), (
        "install the package anew: pip install -e ."
    )


@pytest.mark.parametrize("first", ["openmmml", "ffpretrain.md.openmmml, openmmml"])
def test_openmmml_does_not_load_torch(first: str) -> None:
    code = (
        f"import sys\nimport {first}\n"
        "print([m for m in ('torch', 'ase', 'ffpretrain.artifacts') if m in sys.modules], "
        "'ffpretrain' in sys.modules['openmmml'].MLPotential._implFactories)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.splitlines()[-1] == "[] True", result.stderr


# --- what users get wrong


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ffpretrain", {}, r"give MLPotential\('ffpretrain', model=...\) a file or one of \['ndem-aspirin'"),
        ("ffpretrain", {"modle": NAME}, "unknown option 'modle' .*did you mean 'model'"),
        (f"ffpretrain-{NAME}", {"model": NAME}, "'ffpretrain-ndem-aspirin' names its model"),
    ],
)
def test_bad_potentials(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        openmmml.MLPotential(name, **options)


def test_bad_systems(droplet: Solution) -> None:
    potential = openmmml.MLPotential("ffpretrain", model=droplet.model, device="cpu")
    with pytest.raises(UnsupportedInputError, match=r"the atoms are C9H\d+O\d+, but 'tiny' was trained"):
        potential.createSystem(droplet.topology)
    with pytest.raises(UnsupportedInputError, match="the atoms are H2O, but 'tiny' was trained"):
        potential.createMixedSystem(droplet.topology, droplet.mm, [21, 22, 23])
    with pytest.raises(ConfigError, match="option 'interpolat' of createMixedSystem; did you mean 'interp"):
        potential.createMixedSystem(droplet.topology, droplet.mm, droplet.aspirin, interpolat=True)
    with pytest.raises(ConfigError, match="option 'dytpe' of createMixedSystem; did you mean 'dtype'"):
        potential.createMixedSystem(droplet.topology, droplet.mm, droplet.aspirin, dytpe="float64")
    molecule = app.PDBFile(str(DATA / "aspirin.pdb")).topology
    with pytest.raises(ConfigError, match="unknown option 'dytpe' of createSystem; did you mean 'dtype'"):
        potential.createSystem(molecule, dytpe="float64")
    molecule.addAtom("M", None, next(molecule.residues()))
    with pytest.raises(UnsupportedInputError, match=r"atom 21 \(M of AIN\) has no element"):
        potential.createSystem(molecule)


def test_a_periodic_force_field_wants_a_box_in_the_topology(box: Solution) -> None:
    topology = copy.deepcopy(box.topology)
    topology.setPeriodicBoxVectors(None)
    potential = openmmml.MLPotential("ffpretrain", model=box.model, device="cpu")
    with pytest.raises(UnsupportedInputError, match="periodic and the topology has no box"):
        potential.createMixedSystem(topology, box.mm, box.aspirin)


def test_options_that_embeddings_read_are_passed(droplet: Solution, monkeypatch: pytest.MonkeyPatch) -> None:
    """openmm-ml's own, those of the potential, and whatever another package's embedding may know."""
    potential = openmmml.MLPotential("ffpretrain", model=droplet.model, device="cpu", on_unfamiliar="ignore")
    parts = droplet.topology, droplet.mm, droplet.aspirin
    system = potential.createMixedSystem(
        *parts, linkAtomDistances=[], interpolate=True, dtype="float64", compile=False
    )
    mixed = energy(system, droplet.nm, lambda_interpolate=1.0)
    assert mixed == pytest.approx(energy(droplet.mixed, droplet.nm), abs=1e-4, rel=0)
    monkeypatch.setitem(openmmml.MLPotential._embeddingFactories, "other", None)
    potential.createMixedSystem(*parts, polarisation=True)


# --- the force field of the example


def example_parameters() -> dict[str, tuple[float, float, float]]:
    """Charge in e, sigma in nm and epsilon in kJ/mol by atom name."""
    root = ElementTree.parse(DATA / "aspirin_in_water.xml").getroot()
    kinds = {
        atom.attrib["type"]: (float(atom.attrib["sigma"]), float(atom.attrib["epsilon"]))
        for atom in root.iter("Atom")
        if "sigma" in atom.attrib
    }
    return {
        atom.attrib["name"]: (float(atom.attrib["charge"]), *kinds[atom.attrib["type"]])
        for atom in root.iter("Atom")
        if "charge" in atom.attrib
    }


def test_its_lennard_jones_values_are_those_of_ff94() -> None:
    """Cornell et al. 1995, table 14: half the distance of the minimum in Å and the depth in kcal/mol."""
    published = {
        "C7": (1.9080, 0.0860), "C1": (1.9080, 0.0860), "C9": (1.9080, 0.1094), "H3": (1.4590, 0.0150),
        "H91": (1.4870, 0.0157), "HO2": (0.0, 0.0), "O1": (1.6612, 0.2100), "O2": (1.7210, 0.2104),
        "O3": (1.6837, 0.1700),
    }  # fmt: skip
    given = example_parameters()
    for name, (radius, depth) in published.items():
        _, sigma, epsilon = given[name]
        assert epsilon == pytest.approx(depth * KCAL, rel=1e-6)
        if depth:
            assert sigma == pytest.approx(0.2 * radius / 2 ** (1 / 6), rel=1e-6)


def test_its_charges_are_those_of_mmff94() -> None:
    chem = pytest.importorskip("rdkit.Chem")
    from rdkit.Chem.rdForceFieldHelpers import MMFFGetMoleculeProperties

    molecule = chem.MolFromPDBFile(str(DATA / "aspirin.pdb"), removeHs=False)
    template = chem.AddHs(chem.MolFromSmiles("CC(=O)Oc1ccccc1C(=O)O"))
    order = template.GetSubstructMatch(chem.MolFromSmarts("[#6,#8,#1]"))
    assert order and molecule.GetNumAtoms() == template.GetNumAtoms() == 21
    from rdkit.Chem.AllChem import AssignBondOrdersFromTemplate

    aspirin = AssignBondOrdersFromTemplate(template, molecule)
    chem.SanitizeMol(aspirin)
    found = MMFFGetMoleculeProperties(aspirin)
    given = example_parameters()
    for atom in aspirin.GetAtoms():
        name = atom.GetPDBResidueInfo().GetName().strip()
        assert given[name][0] == pytest.approx(found.GetMMFFPartialCharge(atom.GetIdx()), abs=1e-4), name
    assert sum(charge for charge, _, _ in given.values()) == pytest.approx(0.0, abs=1e-12)
