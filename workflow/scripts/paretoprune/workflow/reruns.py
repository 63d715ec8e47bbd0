"""Which source files a script depends on, so that editing a module reruns exactly the steps that use it."""

import ast
from functools import cache
from pathlib import Path


def import_closure(script: Path, root: Path) -> list[Path]:
    """The files under `root` that a script imports, directly or through one another.

    Only absolute imports are followed, wherever they stand in a file; a package counts by its `__init__.py`.

    Args:
        script: The script.
        root: The folder that imports start from.

    Returns:
        Sorted paths, `script` itself excluded.

    Raises:
        SyntaxError: A file cannot be parsed.
    """
    found: set[Path] = set()
    waiting = [script]
    while waiting:
        names = _imported_names(waiting.pop().read_text(encoding="utf-8"))
        for file in {file for name in names for file in _files_of(name, root)} - found:
            found.add(file)
            waiting.append(file)
    return sorted(found - {script})


@cache
def _imported_names(text: str) -> frozenset[str]:
    """Dotted names of modules, and of what is imported from them, which may be modules too.

    Most modules are behind several steps, and reading a text anew was half of what starting the workflow took.
    """
    names: set[str] = set()
    tree = ast.parse(text)
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            # Imports for the type checker alone never run.
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


def _files_of(name: str, root: Path) -> list[Path]:
    """The files that importing a dotted name executes: every package on the way, and the module."""
    parts = name.split(".")
    paths = [root.joinpath(*parts[: i + 1]) for i in range(len(parts))]
    candidates = [path / "__init__.py" for path in paths] + [paths[-1].with_suffix(".py")]
    return [path for path in candidates if path.is_file()]
