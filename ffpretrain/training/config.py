"""Recipes: what a training run does, typed and validated. The field descriptions are the documentation."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ffpretrain.errors import ConfigError, nearest


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )


class BackboneConfig(_Strict):
    """Which network, and its size."""

    name: str = Field(
        default="torchmd-et",
        description="backbone name: `torchmd-et`, `painn`, `egnn`, `schnet`, or a plug-in's",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="constructor arguments of the backbone")


class ModelConfig(_Strict):
    """Where the network comes from."""

    backbone: BackboneConfig | None = Field(
        default=None, description="null takes that of `pretrained`, or `torchmd-et` with its defaults"
    )
    pretrained: str | None = Field(
        default=None, description="named model or model file whose backbone weights to start from"
    )
    pretrained_head: bool = Field(
        default=False,
        description="take energy head and scale from `pretrained` too; it must know all elements of the data",
    )


class ObjectiveConfig(_Strict):
    """What is trained for."""

    name: str = Field(default="ndem", description="objective name, one of docs/objectives.md or a plug-in's")
    options: dict[str, Any] = Field(default_factory=dict, description="fields of the objective")


class DataConfig(_Strict):
    """Which frames, and how they are split."""

    source: str = Field(description="file, format or dataset name such as `rmd17` or `ethanol-gfn2`")
    molecule: str | None = Field(default=None, description="molecule or file, for formats that need one")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the reader")
    train: int | float = Field(
        description="number of training frames; below 1 a fraction of the data, rounded down", gt=0
    )
    val: int | float = Field(description="number of validation frames, or a fraction", gt=0)
    test: int | float | None = Field(
        default=None, description="number of held-out frames, or a fraction; null takes all the rest", ge=0
    )
    max_frames: int | None = Field(
        default=None,
        gt=0,
        description="take no more frames than these, drawn at random; fractions and the rest are of them",
    )
    split_seed: int = Field(default=0, description="seed of the random split and choice", ge=0)
    split_file: Path | None = Field(
        default=None, description="saved split to use instead; the sizes and the seed then do not count"
    )

    temperature: float = Field(
        default=300.0,
        gt=0,
        description="K, of the ensemble the frames are from; sets the energy scale of what is learned "
        "without labels, and nothing else",
    )

    @field_validator("train", "val", "test")
    @classmethod
    def _whole_or_fraction(cls, value: float | None) -> float | None:
        if value is not None and value >= 1 and value != int(value):
            raise ValueError("must be a whole number, or a fraction below 1")
        return value


class OptimizerConfig(_Strict):
    """AdamW."""

    lr: float = Field(default=1e-3, gt=0, description="largest learning rate")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled decay of weight matrices")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="decay of the two moments")
    eps: float = Field(default=1e-8, gt=0, description="added to the denominator")
    amsgrad: bool = Field(default=False, description="use the largest second moment so far")


class ScheduleConfig(_Strict):
    """Learning rate over the run."""

    name: Literal["cosine", "plateau", "constant"] = Field(
        default="cosine", description="what follows the warm-up"
    )
    warmup_steps: int = Field(default=500, ge=0, description="steps of the linear rise")
    final_fraction: float = Field(default=0.0, ge=0, le=1, description="cosine: last rate over largest")
    factor: float = Field(default=0.8, gt=0, lt=1, description="plateau: factor at each drop")
    patience: int = Field(
        default=10, ge=0, description="plateau: validations without improvement before a drop"
    )
    min_lr: float = Field(default=1e-7, ge=0, description="plateau: smallest rate")
    monitor: str | None = Field(
        default=None,
        description="plateau: quantity watched; null: `val/forces_mae`, or `val/loss` without labels",
    )


class TrainerConfig(_Strict):
    """How long and on what."""

    max_steps: int = Field(gt=0, description="optimiser steps")
    batch_size: int = Field(default=8, gt=0, description="structures per step, over all processes")
    val_every_steps: int = Field(default=500, gt=0, description="steps between validations and checkpoints")
    val_batch_size: int = Field(default=50, gt=0, description="structures evaluated together in validation")
    ema_decay: float | None = Field(
        default=0.999, gt=0, lt=1, description="weight averaging; null switches it off"
    )
    gradient_clip: float | None = Field(
        default=10.0, gt=0, description="largest gradient norm; null for none"
    )
    early_stopping: int | None = Field(
        default=None, gt=0, description="stop after so many validations without gain"
    )
    precision: Literal["float32", "float64"] = Field(default="float32", description="of weights and training")
    compile: Literal["auto"] | bool = Field(
        default="auto",
        description="`auto`: native messages on a CPU where the backbone has them; true: compile others too",
    )
    seed: int = Field(default=0, description="of weights, batches and noise", ge=0)
    accelerator: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="`auto` takes a GPU if there is one"
    )
    devices: int = Field(default=1, gt=0, description="processes or GPUs")
    threads: int | None = Field(
        default=None, gt=0, description="CPU threads per process while training; null leaves torch's choice"
    )


class Recipe(_Strict):
    """One training run."""

    name: str = Field(description="name of the model made", min_length=1)
    description: str = Field(default="", description="one line for the model's card")
    licence: str | None = Field(default=None, description="of the weights")
    citation: list[str] = Field(default_factory=list, description="what to cite when the model is used")
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="what is trained for")
    model: ModelConfig = Field(default_factory=ModelConfig, description="where the network comes from")
    data: DataConfig = Field(description="which frames, and how they are split")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="learning rate over the run")
    trainer: TrainerConfig = Field(description="how long and on what")


def validate_recipe(raw: dict[str, Any], where: str) -> Recipe:
    """Check a recipe's fields.

    Args:
        raw: nested dictionaries as read from YAML.
        where: file or place, for messages.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a wrong type or a value out of range.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_explain(e) for e in error.errors()[:3])) from None


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section of a recipe that a field holds, or None where it holds a value."""
    for choice in (annotation, *typing.get_args(annotation)):
        if isinstance(choice, type) and issubclass(choice, BaseModel):
            return choice
    return None


def _explain(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        owner = _model_at(error["loc"][:-1])
        *under, name = path.split(".")
        return f"unknown key {path!r}{nearest(name, owner.model_fields, '.'.join(under))}"
    if error["type"] == "missing":
        hint = "; give --data FILE" if path == "data.source" else ""
        return f"key {path!r} is missing{hint}"
    message = error["msg"][:1].lower() + error["msg"][1:]
    return f"{path or 'recipe'}: {message} (got {str(error['input'])[:60]!r})"


def _model_at(location: tuple[Any, ...]) -> type[BaseModel]:
    model: type[BaseModel] = Recipe
    for part in location:
        section = (
            section_of(model.model_fields[str(part)].annotation) if str(part) in model.model_fields else None
        )
        if section is None:
            break
        model = section
    return model
