"""When native code is waited for: not at a first energy under "auto", but in long runs and under True."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ase.build import molecule

from ffpretrain.md.compiled import CompileWarning
from ffpretrain.md.native import path, ready
from ffpretrain.md.native.build import NativeUnavailable
from ffpretrain.md.runtime import Runtime
from ffpretrain.native import build as native_build
from ffpretrain.potential import Potential


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    """Pretend that the library is not in the cache; the list grows with every build in the background."""
    started: list[None] = []
    monkeypatch.setattr(ready, "is_built", lambda: False)
    monkeypatch.setattr(ready, "_build_apart", lambda: started.append(None))
    ready._say.cache_clear()
    yield started
    ready._say.cache_clear()


def evaluate(runtime: Runtime) -> str:
    water = molecule("H2O")
    runtime.evaluate(water.numbers, water.positions)
    return runtime.backend.split()[0]


def test_the_first_energy_waits_for_no_compiler(
    build_potential: Callable[..., Potential], not_built: list[None]
) -> None:
    runtime = Runtime(build_potential(hidden=32), "cpu", "float32", "auto")
    with pytest.warns(CompileWarning, match="stays eager"):
        assert evaluate(runtime) == "dense"
    assert not_built and "background" in runtime.not_native
    assert evaluate(runtime) == "dense"


@pytest.mark.parametrize(("compiled", "steps"), [(True, 0), ("auto", ready.NATIVE_MIN_STEPS)])
def test_long_runs_and_true_wait(
    compiled: bool, steps: int, build_potential: Callable[..., Potential], not_built: list[None]
) -> None:
    runtime = Runtime(build_potential(hidden=32), "cpu", "float32", compiled)
    runtime.expected_steps = steps
    with pytest.warns(CompileWarning, match="building the native code"):
        assert evaluate(runtime) == "native"
    assert not not_built


def test_a_missing_compiler_is_said_once(
    build_potential: Callable[..., Potential],
    not_built: list[None],
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.setattr(ready, "find_compiler", lambda: None)
    for _ in range(2):
        assert evaluate(Runtime(build_potential(hidden=32), "cpu", "float32", "auto")) == "dense"
    assert len([w for w in recwarn if "no C++ compiler" in str(w.message)]) == 1
    assert not not_built


def test_a_build_that_failed_in_the_background_is_said_next_time(
    build_potential: Callable[..., Potential],
    not_built: list[None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n[ $1 = --version ] && exec echo 1\necho 'error: no such header' >&2; exit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("FFPRETRAIN_CACHE", str(tmp_path / "cache"))
    library = native_build.NativeLibrary(Path(path.__file__).parent, lambda _: None)
    monkeypatch.setattr(ready, "failure", library.failure)
    assert library.failure() is None
    with pytest.raises(NativeUnavailable):
        library.load()
    runtime = Runtime(build_potential(hidden=32), "cpu", "float32", "auto")
    with pytest.warns(CompileWarning, match=r"no such header: running eager.*tries again"):
        assert evaluate(runtime) == "dense"
    assert not not_built
    (mark,) = (tmp_path / "cache" / "native").glob("*.failed")
    os.utime(mark, (0, 0))
    assert library.failure() is None


def test_nothing_is_built_for_a_backbone_without_native_code(
    build_potential: Callable[..., Potential], not_built: list[None]
) -> None:
    evaluate(Runtime(build_potential(name="schnet"), "cpu", "float32", "auto"))
    assert not not_built


def test_a_build_that_fails_is_said(
    build_potential: Callable[..., Potential], not_built: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise NativeUnavailable("c++ failed: no such header")

    monkeypatch.setattr(path, "load_library", broken)
    runtime = Runtime(build_potential(hidden=32), "cpu", "float32", "auto")
    runtime.expected_steps = ready.NATIVE_MIN_STEPS
    with pytest.warns(CompileWarning, match="no such header: running eager"):
        assert evaluate(runtime) == "dense"
