"""The two top-level folders are importable as ffpretrain.md and ffpretrain.datasets however it was installed.

A wheel is built once, by way of the source distribution, and installed into an environment of its own that
sees this one's third-party packages, but not its copy of ffpretrain.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import ffpretrain
from ffpretrain import _layout

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"ffpretrain": "ffpretrain", "md": "ffpretrain/md", "datasets": "ffpretrain/datasets"}
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
WHERE = """
import ffpretrain, ffpretrain.md, ffpretrain.datasets, ffpretrain.datasets.frames
from importlib.resources import files
for module in (ffpretrain, ffpretrain.md, ffpretrain.datasets, ffpretrain.datasets.frames):
    print(module.__file__)
print(files("ffpretrain.datasets"))
"""

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="needs a checkout or an unpacked source distribution"
)


def run(command: list[str | Path], cwd: Path, **env: str) -> str:
    """Run a command without the variables that would change which copy is imported; return its output."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**clean, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def places(checkout: Path) -> list[Path]:
    """Return what the code WHERE prints when everything is imported from a checkout."""
    names = (
        "ffpretrain/__init__.py",
        "md/__init__.py",
        "datasets/__init__.py",
        "datasets/frames.py",
        "datasets",
    )
    return [checkout / name for name in names]


def installed_files(checkout: Path) -> set[str]:
    """Return the paths in the package of every file of the three folders, caches apart."""
    return {
        f"{target}/{path.relative_to(checkout / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in (checkout / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout to build from, so that the checkout gets no build folders."""
    caches = ("__pycache__", ".*_cache", "*.egg-info", "build", "dist")
    skip = shutil.ignore_patterns(".git", *caches, "runs", "ffpretrain-demo", "lightning_logs")
    folder = tmp_path_factory.mktemp("build") / "copy"
    shutil.copytree(ROOT, folder, ignore=skip)
    return folder


@pytest.fixture(scope="module")
def sdist(copy: Path) -> Path:
    """The unpacked source distribution."""
    work = copy.parent
    name = run([sys.executable, "-c", BUILD, "build_sdist", work], copy).split()[-1]
    with tarfile.open(work / name) as archive:
        archive.extractall(work, filter="data")
    return work / name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel, built from the source distribution."""
    name = run([sys.executable, "-c", BUILD, "build_wheel", sdist.parent], sdist).split()[-1]
    return sdist.parent / name


def make_environment(folder: Path, archive: Path) -> Path:
    """Install a wheel into a new environment that borrows this one's third-party packages.

    Returns:
        the environment's python; the console script ``ffpretrain`` lies beside it.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(packages)
    # A plain path line: the .pth files over there, an editable install's finder among them, are not run.
    (packages / "zz_third_party.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = folder / "bin" / "python"
    script = folder / "bin" / "ffpretrain"
    script.write_text(f"#!{python}\nfrom ffpretrain.cli import main\nmain()\n")
    script.chmod(0o755)
    return python


@pytest.fixture(scope="module")
def wheel_python(wheel: Path) -> Path:
    """The interpreter of an environment into which the wheel was installed."""
    return make_environment(wheel.parent / "env", wheel)


def test_wheel_holds_every_package_and_data_file(wheel: Path, copy: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = next(name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        scripts = archive.read(entry_points).decode()
    assert names == installed_files(copy)
    assert "ffpretrain/py.typed" in names
    assert "ffpretrain = ffpretrain.cli:run" in scripts


def test_sdist_holds_all_tracked_files(sdist: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing to compare with")
    tracked = run(["git", "ls-files", "--cached"], ROOT).splitlines()
    missing = [name for name in tracked if (ROOT / name).is_file() and not (sdist / name).is_file()]
    assert not missing


def test_every_folder_of_code_is_a_package() -> None:
    folders = {path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]


def test_wheel_from_elsewhere(wheel_python: Path, tmp_path: Path) -> None:
    site = wheel_python.parents[1]
    for line in run([wheel_python, "-c", WHERE], tmp_path).splitlines():
        assert Path(line).is_relative_to(site)
        assert "/ffpretrain/" in line
    assert run([wheel_python, "-m", "ffpretrain", "--version"], tmp_path).split() == [
        "ffpretrain",
        ffpretrain.__version__,
    ]


def test_wheel_in_the_repository_root(wheel_python: Path) -> None:
    """python -c takes the checkout from the working folder, all of it; the console script takes the wheel."""
    lines = run([wheel_python, "-c", WHERE], ROOT, PYTHONDONTWRITEBYTECODE="1").splitlines()
    assert [Path(line) for line in lines] == places(ROOT)
    script = wheel_python.with_name("ffpretrain")
    assert run([script, "--version"], ROOT).split()[-1] == ffpretrain.__version__
    probe = [wheel_python, "-P", "-c", WHERE]  # -P: no working folder on the path, as in a console script
    assert all(Path(line).is_relative_to(wheel_python.parents[1]) for line in run(probe, ROOT).splitlines())


def test_modules_run_with_dash_m(wheel_python: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, ROOT):
        run([wheel_python, "-m", "ffpretrain.datasets.frames"], folder, PYTHONDONTWRITEBYTECODE="1")


def test_pytest_in_the_checkout_with_the_wheel(wheel_python: Path, tmp_path: Path) -> None:
    test = tmp_path / "test_where.py"
    test.write_text("import ffpretrain.md\n\ndef test_where():\n    print('FOUND', ffpretrain.md.__file__)\n")
    options = ["-q", "-s", "-p", "no:cacheprovider", "--import-mode=importlib", "--rootdir", ROOT, test]
    environment = {"PYTHONDONTWRITEBYTECODE": "1"}
    out = run([wheel_python, "-m", "pytest", "-c", ROOT / "pyproject.toml", *options], ROOT, **environment)
    assert f"FOUND {ROOT / 'md' / '__init__.py'}" in out


def test_editable_install(copy: Path, tmp_path: Path) -> None:
    """It serves the three folders of the checkout, from any folder, setuptools' own finder being active."""
    name = run([sys.executable, "-c", BUILD, "build_editable", tmp_path], copy).split()[-1]
    python = make_environment(tmp_path / "env", tmp_path / name)
    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path / "elsewhere", copy):
        lines = run([python, "-c", WHERE], folder).splitlines()
        assert [Path(line) for line in lines] == places(copy)
        assert (
            run([python.with_name("ffpretrain"), "--version"], folder).split()[-1] == ffpretrain.__version__
        )


def test_foreign_datasets_folder_is_never_taken(tmp_path: Path) -> None:
    """Beside an incomplete installation, site-packages/datasets is somebody else's package."""
    site = tmp_path / "site"
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "ffpretrain", site / "ffpretrain", ignore=skip)
    (site / "datasets").mkdir()
    (site / "datasets" / "__init__.py").write_text("raise SystemExit('foreign package imported')\n")
    code = "import ffpretrain\ntry: import ffpretrain.datasets\nexcept ModuleNotFoundError as e: print(e)"
    out = run([sys.executable, "-S", "-c", code], tmp_path, PYTHONPATH=str(site))
    assert "No module named 'ffpretrain.datasets'" in out


def test_finder_leaves_every_other_name_alone() -> None:
    finder = _layout.SiblingFolderFinder
    assert finder.find_spec("datasets") is None
    assert finder.find_spec("ffpretrain.datasets.frames") is None
    before = list(sys.meta_path)
    _layout.install()
    assert sys.meta_path == before
