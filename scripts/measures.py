"""How large the code is, beside its limits: `python -m scripts.measures` (exit code 1 if one does not hold).

Of all Python files but tests; that no import leads back to its module is a test (tests/test_architecture.py).
"""

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("llava", "train", "inference", "inference_optimization", "data_gen", "scripts")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def main() -> int:
    """Print the measures; 1 if one is exceeded."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    lengths = sorted(node.end_lineno - node.lineno + 1 for node in functions)
    documented = [ast.get_docstring(node) is not None for tree in trees for node in public(tree)]
    longest = max(lines, key=lines.__getitem__)
    measures = [
        (f"lines of {len(files)} files", sum(lines.values()), 15_500),
        (f"longest file ({longest})", lines[longest], 400),
        ("median function", statistics.median(lengths), 8),
        ("90 % of functions", lengths[int(0.9 * len(lengths))], 20),
        ("public names without a docstring, %", round(100 - 100 * statistics.mean(documented), 1), 5),
    ]
    for what, value, limit in measures:
        print(f"{'ok' if value <= limit else 'NO':4}{what}: {value} (at most {limit})")
    return int(any(value > limit for _, value, limit in measures))


def public(node: ast.AST) -> Iterator[ast.AST]:
    """A module, its public classes and functions, and their methods; what is inside functions is nobody's to call."""
    yield node
    for child in node.body:
        if isinstance(child, (ast.ClassDef, *FUNCTIONS)) and not child.name.startswith("_"):
            yield from public(child) if isinstance(child, ast.ClassDef) else [child]


if __name__ == "__main__":
    sys.exit(main())
