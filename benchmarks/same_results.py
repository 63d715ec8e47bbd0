"""Compare two folders of results file by file; a change that only moves code must leave them equal.

    python -m benchmarks.same_results BEFORE AFTER

Fronts, masks, networks, histories (but for their times), anchors and tables must be equal to the byte. Logs, benchmarks
and the report's page are not compared.
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = (".csv", ".npz", ".json", ".safetensors")
# Measured anew by every run.
TIMES = ("seconds",)
LEFT_OUT = ("logs", "benchmarks", "data")


def compared_files(folder: Path) -> Iterator[Path]:
    """Result files of a folder, relative to it, in order."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.suffix in SUFFIXES and relative.parts[0] not in LEFT_OUT:
            yield relative


def content(path: Path) -> object:
    """The content of a file that must be equal: its bytes, or the rows of a table without times."""
    if path.suffix != ".csv":
        return path.read_bytes()
    with path.open(newline="", encoding="utf-8") as handle:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(handle)]


def differences(before: Path, after: Path) -> list[str]:
    """One line for each file that differs or that only one folder has."""
    names = sorted({*compared_files(before), *compared_files(after)})
    found = []
    for name in names:
        if not (before / name).is_file() or not (after / name).is_file():
            found.append(f"{name}: only in {before if (before / name).is_file() else after}")
        elif content(before / name) != content(after / name):
            found.append(f"{name}: differs")
    return found


def main() -> None:
    """Print what differs; exits with 1 if anything does, or if there is nothing to compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    arguments = parser.parse_args()
    n_files = len(list(compared_files(arguments.before)))
    found = differences(arguments.before, arguments.after)
    print("\n".join(found) or f"{n_files} files are the same")
    sys.exit(bool(found) or not n_files)


if __name__ == "__main__":
    main()
