"""Versions agree, the constraints are complete, and the code keeps the rules that a parser can see."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import ffpretrain

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("ffpretrain", "md", "datasets")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MAX_FILE = 400
MAX_FUNCTION = 60

Function = ast.FunctionDef | ast.AsyncFunctionDef


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    """The parsed source files by their path in the repository."""
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


@pytest.fixture(scope="module")
def project() -> dict[str, object]:
    """The [project] table of pyproject.toml."""
    table: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def calls(tree: ast.Module, *names: str) -> Iterator[ast.Call]:
    """Yield the calls in a file whose dotted name is one of those given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in names:
            yield node


def keyword(call: ast.Call, name: str) -> object:
    """Return the constant value of a keyword argument, or None where it is absent or not a constant."""
    value = next((item.value for item in call.keywords if item.arg == name), None)
    return value.value if isinstance(value, ast.Constant) else None


def public(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """Yield the public functions of a module and the public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for member in node.body:
                if isinstance(member, Function) and not member.name.startswith("_"):
                    yield f"{node.name}.{member.name}", member


def is_overload(function: Function) -> bool:
    """Whether this is one of the signatures of an overloaded function."""
    return any(ast.unparse(mark).endswith("overload") for mark in function.decorator_list)


def body_lines(function: Function) -> int:
    """Return how many lines a function has, its signature and docstring apart."""
    statements = function.body[1:] if ast.get_docstring(function) else function.body
    return (statements[-1].end_lineno or 0) - statements[0].lineno + 1 if statements else 0


def test_versions_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert citation["version"] == newest[1] == ffpretrain.__version__
    assert citation["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


def test_readme_holds_the_two_install_lines() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert "pip install -c constraints.txt -e . && ffpretrain demo" in lines
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in lines


def test_readme_links_every_page_and_only_existing_files() -> None:
    text = (ROOT / "README.md").read_text()
    linked = [target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target]
    contents = text.split("## Documentation")[1].split("\n## ")[0]
    pages = re.findall(r"\]\((docs/[^)#]+)", contents)
    assert len(pages) == len(set(pages))
    assert not [target for target in linked if not (ROOT / target).exists()]
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} == set(pages)


def constraints() -> dict[str, Version]:
    """The pinned version of each distribution in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(len(pin.specifier) == 1 and next(iter(pin.specifier)).operator == "==" for pin in pins)
    return {canonicalize_name(pin.name): Version(next(iter(pin.specifier)).version) for pin in pins}


def test_every_dependency_is_pinned_within_its_range(project: dict[str, object]) -> None:
    pins = constraints()
    extras: dict[str, list[str]] = project["optional-dependencies"]  # type: ignore[assignment]
    core: list[str] = project["dependencies"]  # type: ignore[assignment]
    wanted = [Requirement(text) for text in [*core, *(text for extra in extras.values() for text in extra)]]
    for requirement in wanted:
        if requirement.name != "ffpretrain":
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
            assert {part.operator for part in requirement.specifier} <= {">=", "<"}, "ranges stay wide"


def test_constraints_cover_what_the_dependencies_install(project: dict[str, object]) -> None:
    """Every distribution that core and the extra ``test`` bring along, by installed metadata, is pinned."""
    from importlib.metadata import PackageNotFoundError, distribution

    pins = constraints()
    extras: dict[str, list[str]] = project["optional-dependencies"]  # type: ignore[assignment]
    core: list[str] = project["dependencies"]  # type: ignore[assignment]
    todo = [Requirement(text) for text in [*core, *extras["test"]] if not text.startswith("ffpretrain")]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        assert name in pins, f"{name} is not in constraints.txt"
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            pytest.fail(f"{name} is not installed: install the extra 'test'")
        if Version(installed.version).public != pins[name].public:
            continue  # the pinned version may need other packages than this one
        for text in installed.requires or []:
            need = Requirement(text)
            if need.marker is None or any(
                need.marker.evaluate({"extra": extra}) for extra in requirement.extras or [""]
            ):
                todo.append(need)


def test_no_assert_in_the_package(trees: dict[str, ast.Module]) -> None:
    """An assert vanishes under -O and is no message for a user. The test kit may: asserting is its work."""
    found = [
        f"{name}:{node.lineno}"
        for name, tree in trees.items()
        if not name.startswith("ffpretrain/testing/")
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]
    assert not found


def test_nothing_is_unpickled(trees: dict[str, ast.Module]) -> None:
    found = []
    for name, tree in trees.items():
        found += [
            f"{name}:{c.lineno} {ast.unparse(c)}"
            for c in calls(tree, "torch.load")
            if keyword(c, "weights_only") is not True
        ]
        found += [
            f"{name}:{c.lineno} {ast.unparse(c)}"
            for c in calls(tree, "np.load", "numpy.load")
            if keyword(c, "allow_pickle") is not False
        ]
        found += [
            f"{name}:{node.lineno} imports {module}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for module in imported(node)
            if module in {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
        ]
    assert not found


def imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Return the top-level names of the modules that a statement imports."""
    modules = (
        [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    )
    return [module.partition(".")[0] for module in modules]


STATE = {"torch.set_default_dtype", "torch.set_default_device", "np.random.seed"}
STATE |= {"random.seed", "os.putenv", "torch.seed", "np.seterr"}
LEGACY = re.compile(
    r"(np|numpy)\.random\.(rand|randn|randint|normal|uniform|choice|shuffle|permutation|random)$"
)
# allowed where the same function puts the former state back
RESTORED_BY = {
    "torch.manual_seed": "fork_rng",
    "torch.set_num_threads": "torch.get_num_threads",
    "torch.use_deterministic_algorithms": "torch.are_deterministic_algorithms_enabled",
}


def test_no_hidden_randomness_or_process_wide_state(trees: dict[str, ast.Module]) -> None:
    """Draws come from a generator; the default dtype, the threads and the environment are the user's."""
    found = []
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in STATE or LEGACY.match(called):
                    found.append(f"{name}:{node.lineno} {called}")
            if isinstance(node, Function):
                text = ast.unparse(node)
                for call, restored_by in RESTORED_BY.items():
                    if f"{call}(" in text and restored_by not in text:
                        found.append(f"{name}:{node.lineno} {node.name} {call}")
            targets = node.targets if isinstance(node, ast.Assign) else []
            found += [f"{name}:{node.lineno}" for t in targets if ast.unparse(t).startswith("os.environ[")]
    assert not found


def test_public_functions_are_annotated(trees: dict[str, ast.Module]) -> None:
    functions = [(name, label, node) for name, tree in trees.items() for label, node in public(tree)]
    assert functions
    assert not [f"{name} {label}" for name, label, node in functions if node.returns is None]
    for name, label, node in functions:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [a.arg for a in arguments if a.annotation is None and a.arg not in {"self", "cls"}]
        assert not bare, f"{name} {label}: {bare}"


def test_public_functions_have_docstrings(trees: dict[str, ast.Module]) -> None:
    functions = [
        (f"{name} {label}", node)
        for name, tree in trees.items()
        for label, node in public(tree)
        if not is_overload(node)
    ]
    bare = [label for label, node in functions if not ast.get_docstring(node)]
    assert 1 - len(bare) / len(functions) >= 0.95, bare


def test_files_and_functions_stay_short(trees: dict[str, ast.Module]) -> None:
    long_files = [str(p.relative_to(ROOT)) for p in SOURCES if len(p.read_text().splitlines()) >= MAX_FILE]
    long_functions = [
        f"{name}:{node.lineno} {node.name}: {body_lines(node)} lines"
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, Function) and body_lines(node) >= MAX_FUNCTION
    ]
    assert not long_files
    assert not long_functions
