"""Read result files back, check them, and summarise them: one row per dataset, network, seed and method.

Nothing here needs torch.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from paretoprune.deployment.latency import LatencyTable
from paretoprune.files import read_json
from paretoprune.fronts import hypervolume
from paretoprune.reporting.subject import Run
from paretoprune.settings import LATENCY

SPLITS = ("train", "calibration", "search", "test")
SUMMARY_COLUMNS = (
    "dataset",
    "network",
    "seed",
    "method",
    "evaluations",
    "seconds",
    "hypervolume_search",
    "hypervolume_test",
    "sparsity_within_1pt",
    "objective",
    "n_members",
    "hypervolume_phase1",
    "phase2_gain",
)

# What each column of a result file holds: "text", "number" (finite, at least 0), "optional" (that, or nothing), "share"
# (0 to 1), or "unread".
_FRONT = {
    "id": "text",
    "stage": "text",
    "density": "share",
    "sparsity": "share",
    "search_error": "share",
    "test_error": "share",
}
_HISTORY = {
    "generation": "unread",
    "evaluations": "number",
    "seconds": "number",
    "hypervolume": "share",
    "stage": "text",
}
_LAYERS = {"id": "text", "layer": "text", "n_weights": "number", "n_kept": "number"}
_FINETUNED = {
    "id": "text",
    "target": "text",
    "density": "share",
    "sparsity": "share",
    "search_top1_error": "unread",
    "test_error_pruned": "share",
    "test_error": "share",
    "dense_test_error": "share",
}
_LATENCY = {
    "id": "text",
    "macs": "number",
    "predicted": "optional",
    "measured": "number",
    "uncertainty": "number",
    "spread": "number",
    "milliseconds": "number",
    "bytes": "optional",
}
# The row of latency.csv that is no member.
_DENSE = "dense"
# Files that not every method has.
_RARE = {"layers": _LAYERS, "finetuned": _FINETUNED, "latency": _LATENCY}
_DENSE_KEYS = (
    "accuracy",
    "n_images",
    "n_prunable",
    "n_parameters",
    "n_classes",
    "search_memorised",
    "source",
)
_ANCHOR_KEYS = ("light", "heavy", "n_weights", "n_corridor", "layers")
_ANCHOR_LAYER_KEYS = ("layer", "n_weights", "n_always_kept", "n_corridor", "n_always_dropped")

_TOLERANCE = 0.01
# Shares are quotients of counts. A share that equals its limit must not fail by rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class RunResults:
    """The result files of one run, over its seeds and the methods.

    Attributes:
        about: The run.
        kinds: "two_phase", "flat" or "allocation" per method, in the order asked for.
        dense: Content of dense/metrics.json per seed.
        fronts: front.csv of every method and seed, with columns `method` and `seed`, and one per cost.
        histories: history.csv likewise.
        layers: layers.csv likewise, two-phase methods only.
        finetuned: finetuned.csv likewise, fine-tuned methods only.
        anchors: Content of anchors.json per (method, seed), two-phase methods only.
        latencies: latency.csv likewise, timed methods only, without the dense network's row; with the columns
            `dense_milliseconds`, `search_error` and `test_error`.
        latency_table: The table that a search after latency followed; None for others.
    """

    about: Run
    kinds: dict[str, str]
    dense: dict[int, dict[str, Any]]
    fronts: pd.DataFrame
    histories: pd.DataFrame
    layers: pd.DataFrame
    finetuned: pd.DataFrame
    anchors: dict[tuple[str, int], dict[str, Any]]
    latencies: pd.DataFrame = field(default_factory=pd.DataFrame)
    latency_table: LatencyTable | None = None

    @property
    def dense_test_error(self) -> float:
        """Test error of the dense network, a share, mean over seeds."""
        return float(np.mean([1 - metrics["accuracy"]["test"] for metrics in self.dense.values()]))

    @property
    def two_phase(self) -> list[str]:
        """The methods with a Phase 1 and a Phase 2."""
        return [method for method, kind in self.kinds.items() if kind == "two_phase"]


def read_run(
    results: Path, run: Run, kinds: Mapping[str, str], finetuned: Collection[str], timed: Collection[str] = ()
) -> RunResults:
    """Read and check every result file of one run.

    Args:
        results: Folder that holds {dataset}/{network}/seed{seed}/.
        run: What to read.
        kinds: Methods to read, with the kind of each.
        finetuned: Methods that have a finetuned.csv. Methods that are not in `kinds` are ignored.
        timed: Methods that have a latency.csv, likewise.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file lacks a column or a key, or holds an impossible value.
    """
    dense: dict[int, dict[str, Any]] = {}
    anchors: dict[tuple[str, int], dict[str, Any]] = {}
    # Other costs than the density may exceed 1, since bytes count the mask. So a hypervolume on them may exceed 1, too.
    front = _FRONT | {cost: "number" for cost in run.costs if cost != "density"}
    history = _HISTORY if run.only_density else _HISTORY | {"hypervolume": "number"}
    tables: dict[str, list[pd.DataFrame]] = {"front": [], "history": [], "layers": [], "finetuned": [], "latency": []}
    for seed in run.seeds:
        folder = results / run.dataset / run.network / f"seed{seed}"
        dense[seed] = _read_dense(folder / "dense" / "metrics.json")
        for method, kind in kinds.items():
            method_folder = folder / method
            read = {
                "front": _read_table(method_folder / "front.csv", front),
                "history": _read_history(method_folder / "history.csv", history, kind),
            }
            if kind == "two_phase":
                read["layers"] = _read_table(method_folder / "layers.csv", _LAYERS)
                _check_members(method_folder / "layers.csv", read["layers"], read["front"])
                anchors[method, seed] = _read_anchors(method_folder / "anchors.json")
            if method in finetuned:
                read["finetuned"] = _read_finetuned(method_folder / "finetuned.csv")
            if method in timed:
                read["latency"] = _read_latency(method_folder / "latency.csv", read["front"])
            for name, table in read.items():
                tables[name].append(table.assign(method=method, seed=seed))
    # Without any file of a kind there is nothing to concatenate; an empty table has the columns all the same.
    columns = {name: [*schema, "method", "seed"] for name, schema in _RARE.items()}
    joined = {
        name: pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns[name])
        for name, parts in tables.items()
    }
    return RunResults(
        run,
        dict(kinds),
        dense,
        fronts=joined["front"],
        histories=joined["history"],
        layers=joined["layers"],
        finetuned=joined["finetuned"],
        anchors=anchors,
        latencies=joined["latency"],
        latency_table=_read_latency_table(results / run.dataset / run.network) if LATENCY in run.costs else None,
    )


def summarise(run: RunResults) -> pd.DataFrame:
    """Summarise a run: effort, quality of the front, and what Phase 2 added, per seed and method.

    Returns:
        Columns `SUMMARY_COLUMNS`, one row per seed and method. Hypervolumes are on (loss, costs), up to the run's
        reference point. `sparsity_within_1pt` is a share; it is NaN if every member loses more than one percentage
        point of test accuracy. The last two columns are NaN for a method without phases.
    """
    costs, reference = run.about.costs, run.about.reference_point
    rows = []
    for seed in run.about.seeds:
        limit = 1 - run.dense[seed]["accuracy"]["test"] + _TOLERANCE + _ROUNDING
        for method, kind in run.kinds.items():
            front = rows_of(run.fronts, method, seed)
            history = rows_of(run.histories, method, seed)
            last = history.iloc[-1]
            within = front.loc[front["test_error"] <= limit, "sparsity"]
            phase1_hypervolume = np.nan
            if kind == "two_phase":
                # The first population and Phase 1 come before the first row of Phase 2.
                phase1_hypervolume = float(history.loc[history["stage"] != "phase2", "hypervolume"].iloc[-1])
            rows.append(
                {
                    "dataset": run.about.dataset,
                    "network": run.about.network,
                    "seed": seed,
                    "method": method,
                    "evaluations": int(last["evaluations"]),
                    "seconds": float(last["seconds"]),
                    "hypervolume_search": hypervolume(front[["search_error", *costs]].to_numpy(), reference),
                    "hypervolume_test": hypervolume(front[["test_error", *costs]].to_numpy(), reference),
                    "sparsity_within_1pt": float(within.max()) if len(within) else np.nan,
                    "objective": run.about.objective,
                    "n_members": len(front),
                    "hypervolume_phase1": phase1_hypervolume,
                    "phase2_gain": float(last["hypervolume"]) - phase1_hypervolume,
                }
            )
    return pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS))


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"expected the result file {path}, found nothing there; "
            "run the step of the workflow that writes it, or leave its run, seed or method out of the report"
        )


def _read_table(path: Path, schema: Mapping[str, str]) -> pd.DataFrame:
    """Read the columns of `schema` from a CSV file and check their values.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A column is missing, or a value is not of the kind that `schema` says.
    """
    _require_file(path)
    remedy = "delete the file and run the step of the workflow that writes it"
    texts = [column for column, holds in schema.items() if holds == "text"]
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(texts, "str"))
    except (pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        raise ValueError(f"{path}: expected the columns {', '.join(schema)}, found {error}; {remedy}") from error
    missing = [column for column in schema if column not in table]
    if missing:
        raise ValueError(
            f"{path}: expected the columns {', '.join(schema)}, "
            f"found {', '.join(table.columns)} without {', '.join(missing)}; {remedy}"
        )
    for column, holds in schema.items():
        if holds not in ("number", "optional", "share"):
            continue
        # What is no number becomes NaN, which the check below finds.
        values = pd.to_numeric(table[column], errors="coerce").astype(float)
        upper = 1 + _ROUNDING if holds == "share" else np.inf
        wrong = ~np.isfinite(values) | (values < -_ROUNDING) | (values > upper)
        if holds == "optional":
            wrong &= table[column].notna()
        if wrong.any():
            expected = "a share between 0 and 1 (80 % is 0.8)" if holds == "share" else "a finite number, at least 0"
            expected += ", or nothing" * (holds == "optional")
            raise ValueError(
                f"{path}: expected {expected} in every row of column '{column}', "
                f"found {table.loc[wrong, column].iloc[0]} in row {int(np.flatnonzero(wrong)[0]) + 1}; {remedy}"
            )
        table[column] = values
    return table[list(schema)]


def _read_history(path: Path, schema: Mapping[str, str], kind: str) -> pd.DataFrame:
    history = _read_table(path, schema)
    remedy = "delete the file and run the search again"
    if not len(history):
        raise ValueError(f"{path}: expected at least one row, found none; {remedy}")
    if not history["evaluations"].is_monotonic_increasing:
        raise ValueError(f"{path}: expected cumulative evaluations, found some that decrease; {remedy}")
    if kind == "two_phase" and "phase1" not in set(history["stage"]):
        found = ", ".join(dict.fromkeys(history["stage"]))
        raise ValueError(f"{path}: expected rows of stage 'phase1' for a two-phase method, found {found}; {remedy}")
    return history


def _read_finetuned(path: Path) -> pd.DataFrame:
    table = _read_table(path, _FINETUNED)
    # A member chosen for several targets gets a row for each: every seed then has a row for every target.
    return table.assign(target=table["target"].astype(str).str.split(", ")).explode("target")


def _read_latency(path: Path, front: pd.DataFrame) -> pd.DataFrame:
    """The rows of members, with errors from the front."""
    table = _read_table(path, _LATENCY)
    dense, members = table[table["id"] == _DENSE], table[table["id"] != _DENSE]
    if len(dense) != 1:
        raise ValueError(
            f"{path}: expected one row with the id '{_DENSE}', found {len(dense)}; delete the file and time again"
        )
    _check_members(path, members, front)
    members = members.merge(front[["id", "search_error", "test_error"]], on="id")
    return members.assign(dense_milliseconds=float(dense["milliseconds"].iloc[0]))


def _read_latency_table(folder: Path) -> LatencyTable:
    _require_file(folder / "latency.json")
    return LatencyTable.load(folder / "latency.json")


def _check_members(path: Path, layers: pd.DataFrame, front: pd.DataFrame) -> None:
    unmatched = set(layers["id"]) ^ set(front["id"])
    if unmatched:
        raise ValueError(
            f"{path}: expected the members of front.csv beside it, found {len(unmatched)} that only one of the two has "
            f"('{min(unmatched)}'); delete both and run the search again"
        )


def _require_keys(path: Path, content: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    missing = [key for key in keys if key not in content]
    if missing:
        raise ValueError(
            f"{path}: expected {', '.join(keys)} in {where}, found {', '.join(content)} without {', '.join(missing)}; "
            "delete the file and run the step of the workflow that writes it"
        )


def _read_dense(path: Path) -> dict[str, Any]:
    _require_file(path)
    metrics = read_json(path)
    _require_keys(path, metrics, _DENSE_KEYS, "the file")
    _require_keys(path, metrics["accuracy"], SPLITS, "'accuracy'")
    _require_keys(path, metrics["n_images"], SPLITS, "'n_images'")
    return metrics


def _read_anchors(path: Path) -> dict[str, Any]:
    _require_file(path)
    anchors = read_json(path)
    _require_keys(path, anchors, _ANCHOR_KEYS, "the file")
    for anchor in ("light", "heavy"):
        _require_keys(path, anchors[anchor], ("density", "error"), f"'{anchor}'")
    for layer in anchors["layers"]:
        _require_keys(path, layer, _ANCHOR_LAYER_KEYS, "every entry of 'layers'")
    return anchors


def rows_of(table: pd.DataFrame, method: str, seed: int) -> pd.DataFrame:
    """Select the rows of one method and seed from a table over all of them."""
    return table[(table["method"] == method) & (table["seed"] == seed)]
