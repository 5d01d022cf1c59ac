"""Starting from a model that is there: its backbone, and its energy head where asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ffpretrain import zoo
from ffpretrain.artifacts import file_sha256, load_potential
from ffpretrain.backbones import Backbone, create_backbone
from ffpretrain.datasets import Dataset
from ffpretrain.datasets.splits import Splits
from ffpretrain.errors import ConfigError
from ffpretrain.evaluation import unfamiliar
from ffpretrain.potential import Model, Potential
from ffpretrain.training.config import ModelConfig


@dataclass(frozen=True)
class Pretrained:
    """A model that another one starts from.

    Attributes:
        name: in its card.
        sha256: of its file.
        kind: as in the card.
        potential: the model itself.
    """

    name: str
    sha256: str
    kind: str
    potential: Model


def open_pretrained(config: ModelConfig) -> Pretrained | None:
    """Return the model that a recipe names, or None.

    Raises:
        ArtifactError: no such model, or a damaged file.
        ConfigError: its head is asked for and it has learned none, or there is no model to take a head from.
    """
    if config.pretrained is None:
        if config.pretrained_head:
            raise ConfigError("model.pretrained_head needs model.pretrained: name a model or a file")
        return None
    path, _ = zoo.locate(config.pretrained)
    potential = load_potential(config.pretrained, trainable=True)
    if potential.card is None:
        raise ConfigError(f"{config.pretrained}: has no card; give a file that ffpretrain wrote")
    card = potential.card
    if config.pretrained_head and (card.kind, card.head.name) != ("potential", "energy"):
        raise ConfigError(
            f"{config.pretrained}: is a {card.kind} with head {card.head.name!r}, it has learned no energy "
            "head to take over; set model.pretrained_head: false"
        )
    return Pretrained(card.name, file_sha256(path), card.kind, potential)


def make_backbone(config: ModelConfig, parent: Pretrained | None) -> Backbone:
    """Return the backbone a recipe asks for, with fresh weights.

    Raises:
        ConfigError: an unknown backbone or option.
    """
    if config.backbone is not None:
        return create_backbone(config.backbone.name, **config.backbone.options)
    if parent is not None and parent.potential.card is not None:
        backbone = parent.potential.card.backbone
        return create_backbone(backbone.name, **backbone.options)
    return create_backbone("torchmd-et")


def load_pretrained(potential: Potential, parent: Pretrained, with_head: bool) -> list[str]:
    """Copy weights of the same name from a pretrained model.

    Args:
        potential: takes the weights; its own precision is kept.
        parent: gives them.
        with_head: copy the energy head as well.

    Returns:
        What did not match, one line each: weights without counterpart on either side, new elements.

    Raises:
        ConfigError: a weight of the same name has another shape, nothing matches, or the head is asked for
            and the data hold an element it never saw.
    """
    parts: list[tuple[str, Any, Any]] = [("backbone", potential.backbone, parent.potential.backbone)]
    new = sorted(set(potential.elements) - set(parent.potential.elements))
    if with_head:
        parts.append(("head", potential.head, parent.potential.head))
        if new:
            raise ConfigError(
                f"model.pretrained_head: {parent.name} never saw {_symbols(new)}; set it to false to "
                "learn a new head"
            )
    lines = [f"new elements, whose embeddings are untrained: {_symbols(new)}"] if new else []
    for name, own, theirs in parts:
        lines += _copy(name, own.state_dict(), theirs.state_dict(), parent.name)
    return lines


def doubts(config: ModelConfig, parent: Pretrained, dataset: Dataset, splits: Splits) -> list[str]:
    """Return what speaks against going on with a model's energy head on other data, one line each.

    Args:
        config: of the recipe; a new head is learned from any data.
        parent: the model.
        dataset: the frames.
        splits: which of them train and validate.
    """
    card = parent.potential.card
    if not config.pretrained_head or card is None:
        return []
    lines = []
    level, theirs = dataset.metadata.level_of_theory, card.level_of_theory
    if level and theirs and level != theirs:
        lines.append(f"{parent.name} learned {theirs}, these labels are {level}: its head starts wrong")
    lines += [f"{parent.name}: {line}" for line in unfamiliar(parent.potential, dataset[splits.train])]
    for data in card.training_data:
        common = set(data.sha256.values()) & set(dict(dataset.metadata.sha256).values())
        if common and data.split_seed != splits.seed:
            lines.append(
                f"{parent.name} was trained on frames of this very file, split with data.split_seed="
                f"{data.split_seed}: validation frames may be among them; set the same seed and sizes"
            )
    return lines


def _copy(part: str, own: dict[str, Tensor], theirs: dict[str, Tensor], parent: str) -> list[str]:
    """Copy tensors of the same name in place; return lines about the others."""
    common = sorted(own.keys() & theirs.keys())
    for key in common:
        if own[key].shape != theirs[key].shape:
            raise ConfigError(
                f"model.pretrained: {part}.{key} is {list(theirs[key].shape)} in {parent} and "
                f"{list(own[key].shape)} in the recipe; leave out model.backbone to take that of {parent}"
            )
    if not common:
        raise ConfigError(f"model.pretrained: {parent} has no weight in common with the recipe's {part}")
    for key in common:
        own[key].copy_(theirs[key])
    lines = []
    for what, keys in (
        (f"not in {parent}, left as drawn", own.keys() - theirs.keys()),
        (f"only in {parent}, not used", theirs.keys() - own.keys()),
    ):
        if keys:
            lines.append(f"{what}: " + ", ".join(f"{part}.{key}" for key in sorted(keys)))
    return lines


def _symbols(numbers: list[int]) -> str:
    from ase.data import chemical_symbols

    return ", ".join(chemical_symbols[number] for number in numbers[:20])
