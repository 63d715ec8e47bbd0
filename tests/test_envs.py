"""The environments: one set of versions for pip and conda, pinned by hash, from no named index."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LOCKS = ("requirements.lock", "requirements-dev.lock")
# Conda's names where they differ from those on PyPI, and its packages without the parts that need a display.
CONDA_NAMES = {
    "moocore": "python-moocore",
    "torch": "pytorch",
    "matplotlib": "matplotlib-base",
    "xxhash": "python-xxhash",
}

PIN = re.compile(r"^(?P<name>[a-z0-9-]+)(?:\[[a-z0-9,-]+\])?==(?P<version>[^ ;\\]+)(?: ; (?P<marker>[^\\]+?))? *\\?$")


def blocks(lock: str) -> list[list[str]]:
    """Logical lines of a lock without comments: a requirement followed by its options."""
    lines = (ROOT / "envs" / lock).read_text(encoding="utf-8").splitlines()
    found: list[list[str]] = []
    for line in (line for line in lines if line.strip() and not line.strip().startswith("#")):
        if line.startswith(" "):
            found[-1].append(line.strip(" \\"))
        else:
            found.append([line])
    return found


def versions(lock: str) -> dict[str, str]:
    """The versions that a lock holds for Python 3.11 on Linux."""
    found = {}
    for requirement, *_ in blocks(lock):
        pin = PIN.match(requirement)
        assert pin, requirement
        marker = pin["marker"] or ""
        if "python_full_version >= '3.12'" not in marker and "sys_platform == 'win32'" not in marker:
            assert pin["name"] not in found, requirement
            found[pin["name"]] = pin["version"]
    return found


def conda_versions() -> dict[str, str]:
    environment = yaml.safe_load((ROOT / "envs" / "environment.yaml").read_text(encoding="utf-8"))
    plain = [line for line in environment["dependencies"] if isinstance(line, str) and line != "pip"]
    (by_pip,) = (line["pip"] for line in environment["dependencies"] if isinstance(line, dict))
    return dict(line.split("=") for line in plain) | dict(line.split("==") for line in by_pip)


def declared() -> list[str]:
    """Names of what the package and its workflow need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = project["dependencies"] + extras["workflow"] + extras["deploy"]
    return [re.split(r"[<>=!~\[ ]", requirement)[0] for requirement in requirements]


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pinned_line_has_hashes_and_nothing_else(lock: str) -> None:
    found = blocks(lock)
    assert len(found) > 50
    for requirement, *options in found:
        assert PIN.match(requirement), requirement
        assert options, f"{requirement} has no hash"
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", option) for option in options), requirement


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_name_no_index_and_no_address(lock: str) -> None:
    text = (ROOT / "envs" / lock).read_text(encoding="utf-8")
    assert not re.findall(r"://|--(?:extra-)?index-url|--find-links|@ file|git\+", text)


def test_the_development_lock_holds_the_same_versions_and_more() -> None:
    run, development = versions("requirements.lock"), versions("requirements-dev.lock")
    assert run.items() <= development.items()
    assert {"pytest", "hypothesis", "ruff", "mypy", "snakefmt"} <= development.keys() - run.keys()


def test_everything_declared_is_locked_and_in_the_conda_environment() -> None:
    names = declared()
    assert len(names) > 10
    assert set(names) <= versions("requirements.lock").keys()
    assert {CONDA_NAMES.get(name, name) for name in names} == conda_versions().keys() - {"python"}


@pytest.mark.parametrize("name", declared())
def test_the_conda_environment_holds_the_version_of_the_lock(name: str) -> None:
    assert conda_versions()[CONDA_NAMES.get(name, name)] == versions("requirements.lock")[name]


def test_the_conda_environment_has_the_python_that_the_lock_is_read_for() -> None:
    assert conda_versions()["python"] == "3.11"


def test_constraints_are_what_was_locked() -> None:
    lines = (ROOT / "envs" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    held = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert held
    assert held.items() <= versions("requirements.lock").items()
