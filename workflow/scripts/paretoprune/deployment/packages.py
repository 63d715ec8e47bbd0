"""Packages that only deployment needs, imported when they are needed."""

import importlib
from types import ModuleType

INSTALL = "pip install 'paretoprune[deploy]'"


def needed(package: str, purpose: str) -> ModuleType:
    """Import an optional package.

    Args:
        package: Its name, which is also the one that pip knows.
        purpose: What it is needed for, as "networks are run by onnxruntime".

    Raises:
        ModuleNotFoundError: The package, or one that it needs itself, is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        missing = error.name or package
        message = f"{purpose}: expected the package '{missing}', found none; `pip install {missing}`, or `{INSTALL}`"
        raise ModuleNotFoundError(message, name=missing) from error
