"""Recipes: what a training run does, typed and validated. The field descriptions are the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ffpretrain.errors import ConfigError, nearest


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class BackboneConfig(_Strict):
    """Which network, and its size."""

    name: str = Field("torchmd-et", description="backbone name, see `ffpretrain doctor`")
    options: dict[str, Any] = Field(default_factory=dict, description="constructor arguments of the backbone")


class ModelConfig(_Strict):
    """Where the network comes from."""

    backbone: BackboneConfig = Field(default_factory=BackboneConfig)
    pretrained: str | None = Field(
        None, description="named model or artefact whose backbone (and head, where it has one) to start from"
    )


class ObjectiveConfig(_Strict):
    """What is trained for."""

    name: str = Field("ndem", description="objective name")
    options: dict[str, Any] = Field(default_factory=dict, description="fields of the objective")


class DataConfig(_Strict):
    """Which frames, and how they are split."""

    source: str = Field(description="file, or a dataset name such as rmd17 or ethanol-gfn2")
    molecule: str | None = Field(None, description="molecule or file, for formats that need one")
    options: dict[str, Any] = Field(default_factory=dict, description="options of open_dataset")
    train: int = Field(description="number of training frames", gt=0)
    val: int = Field(description="number of validation frames", gt=0)
    test: int | None = Field(None, description="number of held-out frames; null takes all the rest", ge=0)
    split_seed: int = Field(0, description="seed of the random split")
    split_file: Path | None = Field(None, description="saved split to use instead of a random one")


class OptimizerConfig(_Strict):
    """AdamW."""

    lr: float = Field(1e-3, gt=0, description="largest learning rate")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of weight matrices")
    betas: tuple[float, float] = Field((0.9, 0.999))
    eps: float = Field(1e-8, gt=0)
    amsgrad: bool = False


class ScheduleConfig(_Strict):
    """Learning rate over the run."""

    name: Literal["cosine", "plateau", "constant"] = "cosine"
    warmup_steps: int = Field(500, ge=0, description="linear rise; cosine and constant only")
    final_fraction: float = Field(0.0, ge=0, le=1, description="cosine: last rate over largest")
    factor: float = Field(0.8, gt=0, lt=1, description="plateau: factor at each drop")
    patience: int = Field(10, ge=0, description="plateau: validations without improvement before a drop")
    min_lr: float = Field(1e-7, ge=0, description="plateau: smallest rate")
    monitor: str = Field("val/forces_mae", description="plateau: quantity watched")


class TrainerConfig(_Strict):
    """How long and on what."""

    max_steps: int = Field(gt=0, description="optimiser steps")
    batch_size: int = Field(8, gt=0, description="structures per step, over all processes")
    val_every_steps: int = Field(500, gt=0, description="steps between validations and checkpoints")
    val_batch_size: int = Field(50, gt=0)
    ema_decay: float | None = Field(0.999, gt=0, lt=1, description="weight averaging; null switches it off")
    gradient_clip: float | None = Field(10.0, gt=0, description="largest gradient norm; null for none")
    early_stopping: int | None = Field(None, gt=0, description="stop after so many validations without gain")
    precision: Literal["float32", "float64"] = Field("float32", description="of weights and training")
    compile: bool = Field(False, description="compile the step; molecules of one size in vacuum only")
    seed: int = Field(0, description="of weights, batches and noise")
    accelerator: str = Field("auto", description="cpu, cuda, auto")
    devices: int = Field(1, gt=0, description="processes or GPUs")
    threads: int | None = Field(None, gt=0, description="CPU threads per process; null leaves torch's choice")


class Recipe(_Strict):
    """One training run."""

    name: str = Field(description="name of the model made")
    description: str = ""
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    trainer: TrainerConfig


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


def _explain(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        owner = _model_at(error["loc"][:-1])
        return f"unknown key {path!r}{nearest(str(error['loc'][-1]), owner.model_fields)}"
    if error["type"] == "missing":
        return f"key {path!r} is missing"
    return f"{path}: {error['msg'].lower()} (got {error['input']!r})"


def _model_at(location: tuple[Any, ...]) -> type[BaseModel]:
    model: type[BaseModel] = Recipe
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return model
