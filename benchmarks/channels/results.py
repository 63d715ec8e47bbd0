"""The file of measured rows: parts and levels of a run replace their own rows only, so that others
can be added later."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from paretoprune.files import read_json, write_json

from benchmarks.channels.measuring import Row

FILE = "channels.json"
_LOGGER = logging.getLogger("benchmarks")


class Results:
    """Rows of one network in a file that may hold those of others.

    Args:
        folder: Where the file is, or will be.
        network: Name of the network.
        about: What is written of it; `fingerprint` says whether rows that are there already belong to it.
    """

    def __init__(self, folder: Path, network: str, about: dict[str, Any]) -> None:
        self.path, self._network = folder / FILE, network
        known = self._read().get(network, {})
        if known and known["fingerprint"] != about["fingerprint"]:
            _LOGGER.warning("rows of another %s or of other images are replaced", network)
            known = {}
        self._about = {**{key: value for key, value in known.items() if key != "rows"}, **about}
        self.rows: list[Row] = known.get("rows", [])

    def replace(self, part: str, rows: Sequence[Row], levels: Collection[float] | None = None) -> None:
        """Write rows in the place of those of the same part, at some levels or at all."""

        def stays(row: Row) -> bool:
            return row["part"] != part or (levels is not None and row["level"] not in levels)

        self.rows = [row for row in self.rows if stays(row)] + [{"part": part, **row} for row in rows]
        networks = self._read()
        networks[self._network] = {**self._about, "rows": self.rows}
        write_json(self.path, {"networks": networks})

    def _read(self) -> dict[str, Any]:
        return dict(read_json(self.path)["networks"]) if self.path.is_file() else {}
