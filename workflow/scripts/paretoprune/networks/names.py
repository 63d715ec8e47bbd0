"""Names of networks, and whether one can be meant, told without importing torch, which takes seconds."""

import ast
import difflib
import importlib.util
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

# The CIFAR residual networks.
CIFAR_RESNETS = tuple(f"resnet{depth}" for depth in (8, 20, 32, 44, 56, 110))
# What a network is told about the images, where its factory has arguments of these names.
FROM_IMAGES = ("num_classes", "in_channels")


def broken_architecture(name: str, arguments: Mapping[str, Any]) -> str | None:
    """What keeps a network from being built, as far as its source tells; None where nothing does.

    Args:
        name: See `networks.architectures.Architecture`.
        arguments: Further keyword arguments of the constructor.
    """
    if name in CIFAR_RESNETS:
        known = ("base_width", *FROM_IMAGES)
        unknown = [argument for argument in arguments if argument not in known]
        return f"'{name}' has no argument {', '.join(unknown)}; it has {', '.join(known)}" if unknown else None
    if ":" in name and not name.startswith("torchvision:"):
        return _broken_factory(name, arguments)
    names = torchvision_names()
    if names and name.removeprefix("torchvision:") not in names:
        close = difflib.get_close_matches(name.removeprefix("torchvision:"), [*CIFAR_RESNETS, *names], n=1, cutoff=0.5)
        return (
            f"expected the name of a network, found '{name}'; "
            + (f"did you mean '{close[0]}'? Otherwise " if close else "")
            + f"give one of {', '.join(CIFAR_RESNETS)}, a torchvision classifier, or package.module:function"
        )
    return None


@cache
def torchvision_names() -> frozenset[str]:
    """The classifiers of the installed torchvision, from its sources; empty where there are none to read."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    folder = Path(spec.submodule_search_locations[0]) / "models"
    builder = re.compile(r"^@register_model\(\)\n(?:@.*\n)*def (\w+)", re.MULTILINE)
    return frozenset(name for file in folder.glob("*.py") for name in builder.findall(file.read_text(encoding="utf-8")))


def _broken_factory(path: str, arguments: Mapping[str, Any]) -> str | None:
    module, _, function = path.partition(":")
    source = _source_of(module)
    remedy = "it must be importable from the folder where snakemake is started, or be installed"
    if source is None and (module.endswith(".py") or "/" in module):
        dotted = ".".join(part for part in module.removesuffix(".py").split("/") if part not in ("", "."))
        return f"expected a factory as package.module:function, found '{path}'; write it as {dotted}:{function}"
    if source is None:
        return f"expected a factory at '{path}' (package.module:function), found no module '{module}'; {remedy}"
    if source.suffix != ".py" or not source.is_file():
        return None
    try:
        tree = ast.parse(source.read_bytes())
    except SyntaxError as error:
        return f"'{source}' is no Python: {error.msg} in line {error.lineno}; correct it"
    names: dict[str, ast.stmt] = {}
    for statement in tree.body:
        names |= dict.fromkeys(_names_of(statement), statement)
    if function not in names:
        if {"*", "__getattr__"} & names.keys() or _has_branches(tree):
            return None
        close = difflib.get_close_matches(function, list(names), n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'?" if close else f"it has {', '.join(list(names)[:8]) or 'nothing'}"
        return f"expected a factory at '{path}', found no '{function}' in '{source}'; {hint}"
    found = names[function]
    if isinstance(found, ast.Assign) and isinstance(found.value, ast.Constant | ast.List | ast.Dict | ast.Tuple):
        return (
            f"expected a function or class at '{path}', found a plain value; give the function that makes the network"
        )
    if isinstance(found, ast.FunctionDef) and not found.decorator_list:
        return _broken_call(path, found.args, arguments)
    return None


def _source_of(module: str) -> Path | None:
    """The file of a module that may lie in the working folder, without importing it; None where there is none."""
    parts = module.split(".")
    for folder in (*map(Path, sys.path), Path.cwd()):
        for file in (folder.joinpath(*parts).with_suffix(".py"), folder.joinpath(*parts, "__init__.py")):
            if file.is_file():
                return file
    try:
        spec = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError):
        return None
    # Built in, compiled, or found by a hook: only its import tells more.
    if spec is None or (len(parts) > 1 and spec.origin and spec.origin.endswith("__init__.py")):
        return None
    return Path(spec.origin or "built-in")


def _names_of(statement: ast.stmt) -> list[str]:
    """The names that a statement defines in its module."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).partition(".")[0] for alias in statement.names]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _has_branches(tree: ast.Module) -> bool:
    """Whether names may be defined under a condition."""
    return any(isinstance(statement, ast.If | ast.Try | ast.With | ast.For) for statement in tree.body)


def _broken_call(path: str, own: ast.arguments, arguments: Mapping[str, Any]) -> str | None:
    """Why a function cannot be called with the configured arguments."""
    positional = [*own.posonlyargs, *own.args]
    needed = [one.arg for one in positional[: len(positional) - len(own.defaults)]]
    needed += [one.arg for one, default in zip(own.kwonlyargs, own.kw_defaults, strict=True) if default is None]
    known = [one.arg for one in (*own.args, *own.kwonlyargs)]
    if missing := [name for name in needed if name not in arguments and name not in FROM_IMAGES]:
        return f"'{path}' needs {', '.join(missing)}; give them in `arguments`"
    if own.kwarg is None and (unknown := [name for name in arguments if name not in known]):
        return (
            f"'{path}' has no argument {', '.join(unknown)}; it has {', '.join(known) or 'none'}; correct `arguments`"
        )
    return None
