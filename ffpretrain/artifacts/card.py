"""The model card: what a model file says of itself, as JSON in its header. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from ffpretrain._version import __version__
from ffpretrain.artifacts.upgrades import FORMAT_VERSION, upgrade
from ffpretrain.errors import ArtifactError, nearest

if TYPE_CHECKING:
    from ase import Atoms

Vector = tuple[float, float, float]


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, validate_assignment=True, protected_namespaces=()
    )


class Component(_Strict):
    """A backbone or head, by registry name."""

    name: str = Field(min_length=1)
    options: dict[str, JsonValue] = Field(default_factory=dict, description="constructor arguments")


class Units(_Strict):
    """Units of everything in the file; there is no other choice, so that none can be mixed up."""

    energy: Literal["eV"] = "eV"
    length: Literal["angstrom"] = "angstrom"
    forces: Literal["eV/angstrom"] = "eV/angstrom"


class Quantity(_Strict):
    """A number with its unit."""

    value: float
    unit: str


class MeasuredErrors(_Strict):
    """Errors on one set of frames that the model was neither trained nor selected on."""

    dataset: str = Field(description="which frames, such as 'rmd17 aspirin, test_01'")
    n_frames: int = Field(gt=0)
    quantities: dict[str, Quantity] = Field(description="such as forces_mae, energy_rmse, forces_rms")


class TrainingData(_Strict):
    """What the model was trained on."""

    name: str
    sha256: dict[str, str] = Field(default_factory=dict, description="checksum by file name")
    split: str = Field(default="", description="how the frames were chosen")
    split_seed: int | None = None
    n_train: int | None = Field(default=None, ge=0)
    n_val: int | None = Field(default=None, ge=0)
    n_test: int | None = Field(default=None, ge=0)
    level_of_theory: str | None = None
    licence: str | None = None
    citation: str | None = None
    statistics: dict[str, Quantity] = Field(default_factory=dict, description="such as forces_rms")


class TrainingRun(_Strict):
    """How long, where and from which seed the weights were trained."""

    steps: int | None = Field(default=None, ge=0)
    selected_step: int | None = Field(default=None, ge=0, description="whose weights were kept")
    wall_seconds: float | None = Field(default=None, ge=0)
    hardware: str | None = None
    seed: int | None = None
    torch: str | None = Field(default=None, description="version")
    date: str | None = Field(default=None, description="ISO 8601")


class Parent(_Strict):
    """A model whose weights this one started from."""

    name: str
    sha256: str


class ReferenceGeometry(_Strict):
    """A structure of the molecule the model is for, so that dynamics need no other file."""

    numbers: list[int] = Field(min_length=1, description="atomic numbers [N]")
    positions: list[Vector] = Field(description="angstrom [N, 3]")
    cell: tuple[Vector, Vector, Vector] | None = Field(
        default=None, description="lattice vectors in rows, angstrom"
    )
    pbc: tuple[bool, bool, bool] = (False, False, False)
    name: str = ""

    @model_validator(mode="after")
    def _fits(self) -> ReferenceGeometry:
        if len(self.numbers) != len(self.positions):
            raise ValueError(f"{len(self.numbers)} atomic numbers but {len(self.positions)} positions")
        if any(self.pbc) and self.cell is None:
            raise ValueError("a periodic geometry needs a cell")
        return self

    def to_atoms(self) -> Atoms:
        """Return the geometry as an ``ase.Atoms``."""
        from ase import Atoms

        return Atoms(self.numbers, self.positions, cell=self.cell, pbc=self.pbc)


class ModelCard(_Strict):
    """Everything a model file says of itself. The field descriptions are the documentation.

    Build one with :func:`~ffpretrain.artifacts.make_card`, which takes what describes the network from the
    potential; a dictionary read from a file goes through :func:`parse_card`.
    """

    format_version: int = Field(default=FORMAT_VERSION, description="of the file")
    package_version: str = Field(default=__version__, description="ffpretrain that wrote the file")
    name: str = Field(min_length=1)
    description: str = ""
    kind: Literal["potential", "direct", "field", "property", "pretrained"] = Field(
        default="potential",
        description="potential: energy with forces by differentiation; direct: energy, and forces that are "
        "not its gradient; field: forces without an energy; property: one number for each structure; "
        "pretrained: weights to start from, whose energy means nothing",
    )
    backbone: Component
    head: Component = Field(default_factory=lambda: Component(name="energy"))
    elements: list[int] = Field(min_length=1, description="atomic numbers the model accepts")
    charges: list[int] = Field(default_factory=lambda: [0], description="total charges it learned, e")
    spins: list[int] = Field(default_factory=lambda: [1], description="spin multiplicities it learned")
    cutoff: float = Field(gt=0, description="angstrom")
    units: Units = Field(default_factory=Units)
    energy_scale: float = Field(default=1.0, description="eV per unit of the network's output")
    energy_shift: float = Field(default=0.0, description="eV per structure, added once")
    force_scale: float | None = Field(
        default=None, description="of a field: eV/angstrom per unit of the network's output, sign included"
    )
    temperature: float | None = Field(
        default=None, gt=0, description="K, sets the energy scale of what was learned without labels"
    )
    reference_energies: dict[int, float] = Field(
        default_factory=dict, description="eV by atomic number, added per atom"
    )
    energy_zero: str | None = Field(default=None, description="what an energy of zero means")
    level_of_theory: str | None = None
    training_data: list[TrainingData] = Field(default_factory=list)
    compositions: list[str] | None = Field(
        default=None, description="formulas in Hill order it was trained on; null where it is not tied to any"
    )
    min_distance: float | None = Field(
        default=None, gt=0, description="smallest distance of two atoms in the training data, angstrom"
    )
    pair_distances: dict[str, tuple[float, float]] | None = Field(
        default=None,
        description="smallest and largest distance below the cutoff by pair, such as 'C-H', angstrom",
    )
    objective: Component | None = None
    recipe: dict[str, JsonValue] | None = Field(default=None, description="the training recipe as it was run")
    reference_geometry: ReferenceGeometry | None = None
    errors: dict[str, MeasuredErrors] = Field(default_factory=dict, description="by a short name of the set")
    agreement: dict[str, JsonValue] = Field(
        default_factory=dict, description="measured differences between ways to evaluate the model"
    )
    training: TrainingRun = Field(default_factory=TrainingRun)
    parents: list[Parent] = Field(default_factory=list)
    citation: list[str] = Field(default_factory=list)
    licence: str | None = Field(default=None, description="of the weights")

    @model_validator(mode="after")
    def _scales(self) -> ModelCard:
        if (self.kind == "field") != (self.force_scale is not None):
            raise ValueError(f"kind {self.kind!r} does not go with force_scale {self.force_scale}")
        return self

    def to_json(self) -> str:
        """Return the card as JSON; equal cards give equal text, and floats survive exactly.

        Raises:
            ArtifactError: a number in a free-form field is NaN or infinite.
        """
        try:
            return json.dumps(
                self.model_dump(mode="json"), allow_nan=False, sort_keys=True, separators=(",", ":")
            )
        except ValueError as error:
            raise ArtifactError(
                f"the card of {self.name!r} holds a number that is NaN or infinite; remove it"
            ) from error


def parse_card(raw: Mapping[str, Any], where: str) -> ModelCard:
    """Check a card's fields, upgrading older formats first.

    Args:
        raw: as read from JSON, or keyword arguments of a new card.
        where: the file or caller, for messages.

    Raises:
        ArtifactError: a newer format, an unknown, missing or wrong field (the nearest known one is named).
    """
    try:
        return ModelCard.model_validate(upgrade(raw, where))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        said = "; ".join(_explain(problem) for problem in problems[:3])
        raise ArtifactError(f"{where}: the model card does not fit: {said}{more}") from None


def printable(text: str, limit: int = 200) -> str:
    """Return text from a file as one line fit for a terminal, shortened to ``limit`` characters."""
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _explain(problem: Any) -> str:
    """Return one of pydantic's findings in a few words."""
    location = tuple(problem["loc"])
    path = printable(".".join(str(part) for part in location), 80)
    if problem["type"] == "extra_forbidden":
        owner = _owner(location)
        hint = nearest(str(location[-1]), owner.model_fields) if owner else ""
        return f"unknown field {path!r}{hint}"
    if problem["type"] == "missing":
        return f"field {path!r} is missing"
    message = printable(problem["msg"])
    return f"{path or 'card'}: {message} (got {printable(repr(problem['input']), 60)})"


def _owner(location: tuple[Any, ...]) -> type[BaseModel] | None:
    """Return the model that an unknown field was given to, or None inside lists and dictionaries."""
    model: type[BaseModel] = ModelCard
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field is not None else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        model = annotation
    return model
