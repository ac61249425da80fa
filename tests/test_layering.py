"""The structure of the package: a spine in a fixed order, wings that only import the spine, and limits on its files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import cvrunner
from tests.benchmarks.structure import LIMITS, measure, misses

PACKAGE = Path(cvrunner.__file__).parent
GROUND = ("errors", "files", "paths", "text")
SPINE = (
    "config", "data", "encoders", "model", "records", "verdict",
    "training", "orchestration", "report", "tracking", "run",
)  # fmt: skip
WINGS = ("tune", "plan", "doctor", "jobs", "inference", "setup")
TOP = ("options", "cli", "api", "__main__")
LAYERS = {
    **dict.fromkeys(GROUND, 0),
    **{name: number for number, name in enumerate(SPINE, 1)},
    **dict.fromkeys(WINGS, len(SPINE) + 1),
    **dict.fromkeys(TOP, len(SPINE) + 2),
}  # fmt: skip
ONLY_IN = {
    "ray": {
        *(f"orchestration/{name}.py" for name in ("ray_executor", "ray_actor", "ray_cluster", "ray_metrics")),
        "jobs/ray_jobs.py",
        "tune/sweep.py",
    },
    "mlflow": {"tracking/mlflow_store.py", "inference/pyfunc_model.py"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_and_package_has_a_place_in_the_order() -> None:
    assert {part(path) for path in FILES} - {"__init__"} <= set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_go_down_the_spine_and_no_wing_imports_another(path: Path) -> None:
    if part(path) == "__init__":
        return
    own = LAYERS[part(path)]
    for name in imported(path):
        pieces = name.split(".")
        if pieces[0] == "cvrunner" and len(pieces) > 1 and pieces[1] in LAYERS:
            same_package = pieces[1] == part(path)
            ground_or_top = own in (LAYERS["errors"], LAYERS["cli"]) and LAYERS[pieces[1]] == own
            assert LAYERS[pieces[1]] < own or same_package or ground_or_top, f"{path} imports {name}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_ray_and_mlflow_are_imported_only_where_they_belong(library: str) -> None:
    importers = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        if any(name == library or name.startswith(f"{library}.") for name in imported(path))
    }
    assert importers
    assert importers <= ONLY_IN[library]


def test_there_are_no_import_cycles() -> None:
    modules = {"cvrunner." + ".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in FILES}
    graph = {
        name: {m for n in imported(path) for m in modules if n == m or n.startswith(f"{m}.")} - {name}
        for name, path in modules.items()
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"import cycle: {' -> '.join([*above, name])}"
        if name not in done:
            for other in graph[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=lambda p: p.parent.name)
def test_packages_export_nothing(path: Path) -> None:
    body = ast.parse(path.read_text()).body
    allowed = 2 if path.parent == PACKAGE else 1  # the version
    assert len(body) <= allowed
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_the_structure_stays_within_its_limits() -> None:
    """Lines, files, function lengths, conditional expressions, comments: see `tests.benchmarks.structure`."""
    assert not misses(measure(PACKAGE), LIMITS)
