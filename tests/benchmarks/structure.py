"""Structure of the code of cvrunner, compared with targets: `python -m tests.benchmarks.structure [CHECKOUT]`.

Prints a table; exit code 1 if a target is missed. Counted in all `.py` files of the package:

- Lines: all. Code lines: those that are not blank, not a comment alone, and not in the docstring of a module, class or
  function. A string below a field, which says what the field means, is code.
- Functions: every `def`, methods and nested ones too, no lambdas. Length: from the line of `def`, without decorators,
  to the last line, less the lines of the docstring; blank lines and comments count.
- Conditional expressions: `a if b else c`, per 1,000 lines of all kinds; nested: those that hold another one.
- Comments: every `#`, also behind code, by code lines.
- Imports inside functions: statements, whatever the number of names. One in a function that is itself within a function
  counts for both. Indented ones outside of functions (`if TYPE_CHECKING:`) do not count.
"""

from __future__ import annotations

import ast
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
SHORT = 3
"""Lines of a function that is hardly one."""
LONG = 400
"""Most lines of a file."""


@dataclass(frozen=True)
class Target:
    """What a measure must be."""

    limit: float
    at_least: bool = False
    """Else: at most."""

    def is_met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"at {'least' if self.at_least else 'most'} {self.limit:,g}"


TARGETS = {
    "lines": Target(15_500),
    "files": Target(100),
    "functions per 100 code lines": Target(7.5),
    f"functions of {SHORT} lines or less, %": Target(27),
    "conditional expressions per 1,000 lines": Target(12),
    "nested conditional expressions": Target(0),
    "comments per 100 code lines": Target(4, at_least=True),
    "imports inside functions": Target(60),
    "longest file, lines": Target(LONG),
    "files at the package root": Target(9),
    f"files above {LONG} lines": Target(0),
}
"""Targets by measure."""

LIMITS = TARGETS | {"lines": Target(26_900), "files": Target(154)}
"""What `make check` enforces: the targets that are met, and for the others today's value. The targets for size were set
before the two-level verdict, the encoder families, the adaptation methods and the checks of bad data."""


def main() -> int:
    checkout = Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY
    measured = measure(checkout / "cvrunner")
    missed = misses(measured, TARGETS)
    print(f"| {'measure':40} | {'value':>8} | {'target':15} | {'':6} |")
    print(f"| {'-' * 40} | {'-' * 7}: | {'-' * 15} | {'-' * 6} |")
    for name, value in measured.items():
        shown = f"{value:,.1f}" if value % 1 else f"{value:,.0f}"
        print(f"| {name:40} | {shown:>8} | {TARGETS[name]!s:15} | {'MISSED' if name in missed else '':6} |")
    return 1 if missed else 0


def misses(measured: Mapping[str, float], targets: Mapping[str, Target]) -> dict[str, str]:
    """Return one sentence for each measure that misses its target."""
    return {
        name: f"{name}: {measured[name]:,.6g}, must be {target}"
        for name, target in targets.items()
        if not target.is_met(measured[name])
    }


def measure(package: Path) -> dict[str, float]:
    """The value of each measure in TARGETS, for a package's folder."""
    files = sorted(package.rglob("*.py"))
    if not files:
        raise FileNotFoundError(f"{package}: no Python files")
    by_file = [_count(path) for path in files]
    total = sum(by_file, Counter())
    values = (
        total["lines"],
        len(files),
        100 * total["functions"] / total["code"],
        100 * total["short"] / total["functions"],
        1000 * total["conditional"] / total["lines"],
        total["nested"],
        100 * total["comments"] / total["code"],
        total["imports"],
        max(count["lines"] for count in by_file),
        sum(path.parent == package for path in files),
        sum(count["lines"] > LONG for count in by_file),
    )
    return dict(zip(TARGETS, values, strict=True))


def _count(path: Path) -> Counter[str]:
    """What one file adds to the sums."""
    with path.open("rb") as file:
        lines, tree = file.readlines(), ast.parse(path.read_bytes())
        file.seek(0)
        comments = [token for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
    no_code = {number for number, line in enumerate(lines, start=1) if not line.strip()}
    no_code |= {token.start[0] for token in comments if token.line.strip().startswith("#")}
    counts = Counter(lines=len(lines), comments=len(comments))
    for node in ast.walk(tree):
        docstring = _docstring_lines(node)
        no_code.update(docstring)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            counts["functions"] += 1
            counts["short"] += node.end_lineno - node.lineno + 1 - len(docstring) <= SHORT
            counts["imports"] += sum(isinstance(inner, ast.Import | ast.ImportFrom) for inner in ast.walk(node))
        elif isinstance(node, ast.IfExp):
            counts["conditional"] += 1
            counts["nested"] += any(isinstance(inner, ast.IfExp) for inner in _below(node))
    counts["code"] = len(lines) - len(no_code)
    return counts


def _docstring_lines(node: ast.AST) -> range:
    """The numbers of the lines of a module's, class's or function's docstring; empty where there is none."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            assert first.end_lineno is not None
            return range(first.lineno, first.end_lineno + 1)
    return range(0)


def _below(node: ast.AST) -> Iterator[ast.AST]:
    return (inner for inner in ast.walk(node) if inner is not node)


if __name__ == "__main__":
    sys.exit(main())
