"""The layers of the design: everything imports only downwards, and Ray and MLflow each live in one file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import cvrunner

PACKAGE = Path(cvrunner.__file__).parent
LAYERS = {
    "chaos": 0, "config": 0, "errors": 0, "files": 0, "paths": 0,
    "data": 1, "records": 2, "evaluation": 2, "model": 3, "training": 4,
    "inference": 5, "orchestration": 5, "reporting": 6,
    "completion": 0, "commands": 7, "job_commands": 7, "run_steps": 7, "tune_commands": 7, "verify_commands": 7,
    "predict_commands": 7, "api": 7, "cli": 7, "__main__": 7,
}  # fmt: skip
ONLY_IN = {
    "ray": {f"orchestration/{name}.py" for name in ("ray_executor", "ray_cluster", "ray_jobs", "ray_metrics", "sweep")},
    "mlflow": {"reporting/tracking.py", "reporting/pyfunc_model.py"},
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


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards(path: Path) -> None:
    if part(path) == "__init__":
        return
    own = LAYERS[part(path)]
    for name in imported(path):
        pieces = name.split(".")
        if pieces[0] == "cvrunner" and len(pieces) > 1 and pieces[1] in LAYERS:
            assert LAYERS[pieces[1]] <= own, f"{path.name} (layer {own}) imports {name}"
            assert LAYERS[pieces[1]] < own or pieces[1] == part(path) or own in (0, 7), f"{path.name} imports {name}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_ray_and_mlflow_are_imported_in_one_place(library: str) -> None:
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
