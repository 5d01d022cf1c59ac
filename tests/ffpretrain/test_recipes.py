"""Recipes: strict YAML, dotted changes, clear errors, shipped ones that hold, a table that is up to date."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ffpretrain.backbones import create_backbone
from ffpretrain.errors import ConfigError
from ffpretrain.objectives import create_objective
from ffpretrain.recipes import list_recipes, load_recipe, recipe_path
from ffpretrain.recipes.reading import apply_changes, parse_override, read_yaml
from ffpretrain.training.config import Recipe, validate_recipe
from ffpretrain.training.folder import differing_keys, recipe_text
from ffpretrain.training.reference import field_table

DOCS = Path(__file__).parents[2] / "docs" / "training.md"
SMALLEST = """
name: mine
data: {source: frames.h5, train: 8, val: 2}
trainer: {max_steps: 10}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", sorted(set(list_recipes()) | {"demo-pretrain", "demo-finetune"}))
def test_shipped_recipes_hold(name: str) -> None:
    """Fields, backbone and objective options are all known, and the card gets a description."""
    recipe = load_recipe(name, data="frames.h5" if name in {"finetune-own", "harden"} else None)
    assert recipe.description
    if recipe.model.backbone is not None:
        backbone = create_backbone(recipe.model.backbone.name, **recipe.model.backbone.options)
        create_objective(recipe.objective.name, backbone=backbone, **recipe.objective.options)


def test_named_models_keep_their_settings() -> None:
    """What the two named models are trained with; a change here is a change of the models."""
    for molecule in ("aspirin", "ethanol"):
        recipe = load_recipe(f"ndem-{molecule}")
        assert (recipe.data.source, recipe.data.molecule) == ("rmd17", molecule)
        assert (recipe.data.train, recipe.data.val, recipe.data.options["part"]) == (950, 50, "train")
        assert recipe.model.backbone is not None
        assert recipe.model.backbone.options == {
            "hidden": 128, "layers": 6, "heads": 8, "rbf": 32, "cutoff": 5.0
        }  # fmt: skip


def test_finetune_own_asks_for_data() -> None:
    with pytest.raises(ConfigError, match=r"key 'data\.source' is missing; give --data FILE"):
        load_recipe("finetune-own")
    recipe = load_recipe("finetune-own", data="mine.h5")
    assert (recipe.data.source, recipe.data.train) == ("mine.h5", 0.8)


def test_data_replaces_the_source_and_what_belongs_to_it() -> None:
    recipe = load_recipe("ndem-aspirin", ["data.options.name=x"], data=Path("mine.h5"))
    assert (recipe.data.source, recipe.data.molecule) == ("mine.h5", None)
    assert recipe.data.options == {"name": "x"}


def test_changes_are_read_as_yaml_and_the_original_is_kept(tmp_path: Path) -> None:
    path = written(tmp_path, SMALLEST)
    words = [
        "trainer.max_steps=20", "optimizer.lr=1e-3", "trainer.ema_decay=null", "data.options.units.energy=ev",
        "objective.options.only_corrupted=true", "optimizer.betas=[0.8, 0.9]", "description=a = b",
    ]  # fmt: skip
    recipe = load_recipe(path, words)
    assert recipe.trainer.max_steps == 20
    assert recipe.optimizer.lr == 1e-3
    assert recipe.trainer.ema_decay is None
    assert recipe.data.options == {"units": {"energy": "ev"}}
    assert recipe.objective.options == {"only_corrupted": True}
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.description == "a = b"
    assert load_recipe(path).trainer.max_steps == 10
    raw = {"a": {"b": 1}}
    assert apply_changes(raw, {"a.b": 2}) == {"a": {"b": 2}}
    assert raw == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("trainer.max_step=3", "unknown key 'trainer.max_step'; did you mean 'trainer.max_steps'"),
        ("trainr.max_steps=3", "unknown key 'trainr'; did you mean 'trainer'"),
        ("model.backbone.nam=painn", "unknown key 'model.backbone.nam'; did you mean 'model.backbone.name'?"),
        ("trainer.max_steps=0", "trainer.max_steps: input should be greater than 0 (got '0')"),
        ("trainer.max_steps=many", "trainer.max_steps: input should be a valid integer"),
        ("optimizer.lr=.nan", "optimizer.lr: input should be"),
        ("optimizer.lr=.inf", "optimizer.lr: input should be a finite number"),
        ("schedule.name=cosin", "schedule.name: input should be 'cosine', 'plateau' or 'constant'"),
        ("trainer.accelerator=mps", "trainer.accelerator: input should be 'auto', 'cpu' or 'cuda'"),
        ("trainer.max_steps.x=3", "trainer.max_steps is a value, not a section"),
        ("data.train=1.5", "must be a whole number, or a fraction below 1"),
        ("trainer.max_steps", "'trainer.max_steps' is not of the form key=value"),
        ("=3", "'=3' is not of the form key=value"),
        ("trainer..x=3", "is not of the form key=value"),
        ("trainer.max_steps=[1", "the value of trainer.max_steps, line 1"),
        ("data=null", "data: input should be"),
    ],
)
def test_wrong_changes_are_one_line_errors(tmp_path: Path, word: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(written(tmp_path, SMALLEST), [word])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "line 2: the key 'name' stands there twice"),
        ("data: {train: 1, train: 2}\n", "line 1: the key 'train' stands there twice"),
        ("name: [1\n", "correct the YAML"),
        ("", "holds nothing"),
        ("- a\n", "holds a list"),
        ("name: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("name: a\n", "key 'data' is missing"),
    ],
)
def test_wrong_files_are_one_line_errors(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_names_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no recipe is called 'ndem-asprin'; did you mean 'ndem-aspirin'"):
        recipe_path("ndem-asprin")
    with pytest.raises(ConfigError, match="no such recipe file"):
        recipe_path(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="is no text"):
        read_yaml(tmp_path / "bytes.yaml")


def test_a_value_keeps_everything_after_the_first_equals_sign() -> None:
    assert parse_override("a.b=c=d") == ("a.b", "c=d")
    assert parse_override("a=") == ("a", None)
    assert parse_override("a=1E+5") == ("a", 1e5)
    assert parse_override("a=-2.5e-3") == ("a", -2.5e-3)
    assert parse_override("a=e5") == ("a", "e5")


def test_a_resolved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = load_recipe("ndem-aspirin", {"data.split_file": "splits/mine.json", "optimizer.lr": 1e-5})
    again = load_recipe(written(tmp_path, recipe_text(recipe)))
    assert again == recipe
    assert load_recipe(tmp_path) == recipe  # the folder of a run
    assert yaml.safe_load(recipe_text(recipe))["optimizer"]["betas"] == [0.9, 0.999]


def test_recipes_are_compared_in_what_a_training_depends_on() -> None:
    one = load_recipe("ndem-aspirin", {"data.options.root": "/a", "trainer.threads": 1})
    other = load_recipe("ndem-aspirin", {"data.options.root": "/b", "trainer.threads": 2, "description": "x"})
    assert differing_keys(one, other) == []
    changed = load_recipe("ndem-aspirin", {"trainer.max_steps": 3, "objective.options.levels": 3})
    assert differing_keys(one, changed) == ["objective.options.levels", "trainer.max_steps"]
    moved = load_recipe("ndem-aspirin", {"data.source": "/a/x.h5"})
    assert differing_keys(moved, load_recipe("ndem-aspirin", {"data.source": "x.h5"})) == []
    assert differing_keys(moved, load_recipe("ndem-aspirin", {"data.source": "y.h5"})) == ["data.source"]


def test_every_field_is_described() -> None:
    def fields(model: type) -> list[tuple[str, str | None]]:
        return [(f"{model.__name__}.{key}", f.description) for key, f in model.model_fields.items()]  # type: ignore[attr-defined]

    missing = [name for name, text in fields(Recipe) if not text]
    assert not missing
    table = field_table()
    assert "| `trainer.max_steps` | required | whole number > 0 | optimiser steps |" in table
    assert (
        "| `schedule.name` | `cosine` | `cosine`, `plateau`, `constant` | what follows the warm-up |" in table
    )
    assert all(row.rstrip().endswith("|") and "|  |" not in row for row in table.splitlines()[1:])


def test_the_table_in_the_documentation_is_up_to_date() -> None:
    """After a change of the fields: ``python -m ffpretrain.training.reference docs/training.md``."""
    assert field_table() in DOCS.read_text(encoding="utf-8")


def test_validation_names_three_problems_at_most() -> None:
    with pytest.raises(ConfigError) as caught:
        validate_recipe({"a": 1, "b": 2, "c": 3, "d": 4}, "here")
    assert str(caught.value).startswith("here: ")
    assert str(caught.value).count(";") <= 5
