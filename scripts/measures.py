"""How large the code is, and whether it keeps to its limits: `python -m scripts.measures` (exit code 1 if not).

Of all Python files but tests: lines, the longest file, imports at module level that lead back to their module, lines of
functions, and the share of public modules, classes and functions that have a docstring.
"""

import ast
import statistics
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("llava", "train", "inference", "inference_optimization", "data_gen", "scripts")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def main() -> int:
    """Print the measures beside their limits; 1 if one is exceeded."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    trees = {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in files}
    lengths = sorted(length for tree in trees.values() for length in function_lengths(tree))
    documented = [has for tree in trees.values() for has in docstrings(tree)]
    longest, circle = max(lines, key=lines.__getitem__), import_circle(trees)
    p90, share = lengths[int(0.9 * len(lengths))], 100 * sum(documented) / len(documented)
    measures = [  # what, how much, limit, whether it holds
        (f"lines of {len(files)} files", sum(lines.values()), "at most 15500", sum(lines.values()) <= 15_500),
        (f"longest file ({longest.relative_to(ROOT)})", lines[longest], "at most 400", lines[longest] <= 400),
        ("import circles", " > ".join(circle) or 0, "0", not circle),
        ("median function", statistics.median(lengths), "at most 8", statistics.median(lengths) <= 8),
        ("90 % of functions", p90, "at most 20", p90 <= 20),
        ("public docstrings", f"{share:.1f} %", "at least 95 %", share >= 95),
    ]
    for what, value, limit, holds in measures:
        print(f"{'ok' if holds else 'NO':4}{what}: {value} ({limit})")
    return 0 if all(holds for *_, holds in measures) else 1


def module_of(path: Path) -> str:
    """The name that a file is imported by; a package is its `__init__.py`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def function_lengths(tree: ast.Module) -> Iterator[int]:
    """Lines of every function, docstring included, decorators not."""
    return (node.end_lineno - node.lineno + 1 for node in ast.walk(tree) if isinstance(node, FUNCTIONS))


def docstrings(node: ast.AST) -> Iterator[bool]:
    """Whether each public module, class, function and method has one; what is inside functions is nobody's to call."""
    yield ast.get_docstring(node) is not None
    for child in node.body:
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from docstrings(child)
        elif isinstance(child, FUNCTIONS) and not child.name.startswith("_"):
            yield ast.get_docstring(child) is not None


def import_circle(trees: dict[str, ast.Module]) -> list[str]:
    """Modules that import each other in a ring when they are loaded; empty if there is none."""
    graph = {name: {other for other in imports(tree) if other in trees} for name, tree in trees.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def imports(node: ast.AST) -> Iterator[str]:
    """Full names of what is imported outside of functions; of `from a import b` both a and a.b, one may be a module."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            yield from (child.module, *(f"{child.module}.{alias.name}" for alias in child.names))
        elif not isinstance(child, (*FUNCTIONS, ast.expr)):
            yield from imports(child)


if __name__ == "__main__":
    sys.exit(main())
