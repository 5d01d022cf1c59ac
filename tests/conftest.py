"""Shared fixtures: where the real datasets are, and the rule that none is skipped where they are present."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from pathlib import Path

import pytest

_DATA = Path(os.environ.get("FFPRETRAIN_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real datasets; a test that asks for it is skipped where they are absent."""
    if not _DATA.is_dir():
        pytest.skip("real datasets absent: set FFPRETRAIN_SHARED_DATA to their folder to run this test")
    return _DATA


@pytest.fixture(scope="session", autouse=True)
def native_library() -> None:
    """Build the native code before anything runs, so that no test is evaluated another way than the last."""
    from ffpretrain.md.native import NativeUnavailable
    from ffpretrain.md.native.build import load_library

    with contextlib.suppress(NativeUnavailable):
        load_library()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skipped real-data test into a failure where the data are present."""
    report = yield
    if report.skipped and _DATA.is_dir() and "shared_data" in getattr(item, "fixturenames", ()):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: real data are present, so this test must not be skipped"
    return report
