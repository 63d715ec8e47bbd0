"""What the page says of measured times: how well they are known, how well they were predicted, and each member's."""

from typing import Any

import numpy as np
import pandas as pd

from paretoprune.deployment.latency import GOOD, LatencyTable
from paretoprune.reporting.read_results import RunResults, rows_of
from paretoprune.reporting.tables import Cell, Table
from paretoprune.settings import Timing


def latency_section(run: RunResults, timing: Timing) -> dict[str, Any]:
    """Collect what the template shows of measured times.

    Args:
        run: Its results, with at least one timed member.
        timing: What members were timed on, and how well their times were to be known.
    """
    threads = "1 thread" if timing.threads == 1 else f"{timing.threads} threads"
    images = "1 image" if timing.batch_size == 1 else f"{timing.batch_size} images"
    worst = float(run.latencies["uncertainty"].max())
    table = run.latency_table
    return {
        "runtime": f"{timing.runtime}, {images} at a time, {threads}",
        "machine": table.machine.processor if table else None,
        "bound": f"{100 * timing.bound:.3g}",
        "uncertainty": f"{100 * worst:.1f}",
        "is_noisy": worst > timing.bound,
        "table": _about_table(table) if table else None,
        "methods": _methods_table(run),
        "members": _members_table(run),
    }


def _about_table(table: LatencyTable) -> dict[str, Any]:
    """How well a table knows times of layers and predicts those of random networks."""
    about: dict[str, Any] = {
        "n_layers": len(table.blocks),
        "uncertainty": f"{100 * table.uncertainty:.1f}",
        "bound": f"{100 * (table.bound or 0):.3g}",
        "is_noisy": table.is_noisy,
        "checked": None,
    }
    if table.checked:
        errors = np.abs(table.checked.errors)
        about["checked"] = {
            "n": len(errors),
            "n_good": table.checked.n_good,
            "good": f"{100 * GOOD:.0f}",
            "median": f"{100 * np.median(errors):.1f}",
            "largest": f"{100 * errors.max():.1f}",
            "uncertainty": f"{100 * table.checked.uncertainty:.1f}",
        }
    return about


def _methods_table(run: RunResults) -> Table:
    """Per timed method, over all seeds: how fast its members are, and how well that was predicted."""
    head = [
        "method", "seeds", "members", "dense network (ms)", "fastest member (% of dense)",
        f"predicted within {100 * GOOD:.0f} %", "median error (%)", "largest error (%)",
        "largest standard error (%)",
    ]  # fmt: skip
    rows = []
    for method, members in run.latencies.groupby("method", sort=False):
        errors = np.abs(_errors(members)).dropna()
        sizes = [f"{100 * errors.median():.1f}", f"{100 * errors.max():.1f}"]
        told = [f"{(errors <= GOOD).sum()} of {len(errors)}", *sizes] if len(errors) else ["none"] * 3
        cells = [
            str(members["seed"].nunique()),
            str(len(members)),
            f"{members['dense_milliseconds'].mean():.3g}",
            f"{100 * members['measured'].min():.1f}",
            *told,
            f"{100 * members['uncertainty'].max():.1f}",
        ]
        rows.append([Cell(str(method), number=False), *map(_number, cells)])
    return Table(head, rows)


def _members_table(run: RunResults) -> Table:
    """Every timed member of the first seed, fastest first within each method."""
    head = [
        "method", "member", "multiply-adds (%)", "predicted time (%)", "measured time (%)",
        "error of the prediction (%)", "milliseconds", "spread of single measurements (%)", "file (kB)",
        "test error (%)",
    ]  # fmt: skip
    rows = []
    for method in run.kinds:
        members = rows_of(run.latencies, method, run.about.seeds[0]).sort_values("measured", kind="stable")
        members = members.assign(error=_errors(members))
        for row in members.to_dict("records"):
            cells = [
                f"{100 * row['macs']:.1f}",
                _optional(100 * row["predicted"], 1),
                f"{100 * row['measured']:.1f} ± {100 * row['measured'] * row['uncertainty']:.1f}",
                _optional(100 * row["error"], 1, signed=True),
                f"{row['milliseconds']:.3g}",
                f"{100 * row['spread']:.1f}",
                _optional(row["bytes"] / 1000, 0),
                f"{100 * row['test_error']:.2f}",
            ]
            rows.append([Cell(method, number=False), Cell(str(row["id"]), number=False), *map(_number, cells)])
    return Table(head, rows)


def _errors(members: pd.DataFrame) -> pd.Series:
    """(predicted - measured) / measured, NaN where there is no prediction."""
    return members["predicted"] / members["measured"] - 1


def _optional(value: float, decimals: int, *, signed: bool = False) -> str:
    return "" if np.isnan(value) else f"{value:{'+' if signed else ''},.{decimals}f}"


def _number(text: str) -> Cell:
    return Cell(text)
