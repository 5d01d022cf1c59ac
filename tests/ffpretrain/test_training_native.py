"""Training with native messages: taken where they pay, compared at the first step, the same run otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ffpretrain.backbones import torchmd_et
from ffpretrain.errors import ConfigError
from ffpretrain.native.build import find_compiler
from ffpretrain.native.messages import LIBRARY
from ffpretrain.recipes import load_recipe
from ffpretrain.training import native
from ffpretrain.training.checkpoints import read_checkpoint
from ffpretrain.training.native import NativeWarning, plain_messages
from ffpretrain.training.run import Run, fit, prepare

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")

SIZE = {"hidden": 8, "layers": 2, "heads": 2, "rbf": 4, "max_z": 9}
BACKBONES = {
    "torchmd-et": {"name": "torchmd-et", "options": SIZE},
    "painn": {"name": "painn", "options": {k: v for k, v in SIZE.items() if k != "heads"}},
}


def run(**changes: Any) -> Run:
    fields = {
        "model.backbone": BACKBONES["torchmd-et"],
        "data.train": 10,
        "data.val": 4,
        "data.test": 0,
        "objective.name": "ndem",
        "objective.options": {"ndem_weight": 0.1},
        "trainer.max_steps": 4,
        "trainer.batch_size": 3,
        "trainer.val_every_steps": 4,
        "trainer.precision": "float64",
        "trainer.accelerator": "cpu",
        "schedule.warmup_steps": 1,
    }
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    return prepare(load_recipe("demo-finetune", fields | changed))


def trained(out: Path, made: Run) -> dict[str, Tensor]:
    fit(made, out)
    return read_checkpoint(out / "checkpoints" / "last.ckpt")["state_dict"]


@pytest.mark.parametrize("name", BACKBONES)
def test_a_run_is_the_same_with_native_messages(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "MIN_STEPS", 4)
    backbone = BACKBONES[name]
    made, plain = run(model__backbone=backbone), run(model__backbone=backbone, trainer__compile=False)
    fast, slow = trained(tmp_path / "native", made), trained(tmp_path / "plain", plain)
    assert not made.module.objective.network.backbone.native_messages  # once trained, it is read plainly
    assert set(made.module.agreement) == {"loss", "gradient"} and not plain.module.agreement
    assert made.module.agreement["gradient"] < 1e-10
    for name, value in slow.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-8, atol=1e-10)


def test_a_short_run_is_plain_unless_asked(tmp_path: Path) -> None:
    LIBRARY.load()  # whether the code is there does not matter: a run goes on as it began
    made = run()
    fit(made, tmp_path / "auto")
    assert not made.module.agreement
    asked = run(trainer__compile=True)
    fit(asked, tmp_path / "asked")
    assert asked.module.agreement


def test_another_result_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torchmd_et.messages

    def wrong(*args: Any) -> tuple[Tensor, Tensor]:
        total, moved = right(*args)
        return total, 1.001 * moved

    monkeypatch.setattr(torchmd_et, "messages", wrong)
    with pytest.raises(ConfigError, match=r"native messages change the (loss|gradient) .*compile=false"):
        fit(run(trainer__compile=True), tmp_path)


def test_without_a_compiler_it_says_so_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(LIBRARY, "_loaded", None)
    monkeypatch.setattr(native, "MIN_STEPS", 1)
    made = run()
    with pytest.warns(NativeWarning, match="no C\\+\\+ compiler found.*several times faster"):
        trained(tmp_path, made)
    assert not made.module.agreement


def test_what_is_plain_inside_is_native_again_after() -> None:
    made = run()
    backbone = made.module.objective.network.backbone
    with plain_messages(made.module.objective):
        pass
    assert not backbone.native_messages
    backbone.use_native_messages()
    with pytest.raises(RuntimeError), plain_messages(made.module.objective):
        assert not backbone.native_messages
        raise RuntimeError
    assert backbone.native_messages
