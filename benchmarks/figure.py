"""The figure and the table of the README beside it, from `results.json`."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

OURS, OTHER, MIDDLE = "#c0392b", "#7f8c8d", "#2c6fad"


def draw(results: dict[str, Any], path: Path) -> None:
    """Six panels: what is faster than what, and how cost grows."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    _engine(axes[0, 0], results["engine"])
    _evaluator(axes[0, 1], results["evaluator"])
    _search(axes[0, 2], results["search"])
    _growth(axes[1, 0], results["scaling"]["depth"], "depth of the ResNet", "seconds per candidate", MIDDLE)
    _growth(axes[1, 1], results["scaling"]["images"], "images (ResNet-20)", "seconds per candidate", MIDDLE)
    population = results["scaling"]["population"]
    _growth(axes[1, 2], population, "population", "seconds per generation", OURS, "population")
    twin = axes[1, 2].twiny()
    corridor = results["scaling"]["corridor"]
    twin.plot([row["value"] for row in corridor], [row["seconds"] for row in corridor], "s--", color=MIDDLE)
    twin.set_xlabel("corridor, share of 10$^6$ weights (squares)", color=MIDDLE)
    twin.set_xlim(0, 1)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _engine(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """Seconds of a generation over the number of weights."""
    series = (
        ("pymoo", "nsga2", "pymoo's defaults, NSGA-II", OTHER, "o-"),
        ("flat", "nsga2", "ours, unguided, NSGA-II", MIDDLE, "s-"),
        ("guided", "nsga2", "ours, guided, NSGA-II", OURS, "o-"),
        ("guided", "moead", "ours, guided, MOEA/D", OURS, "^--"),
    )
    for engine, algorithm, label, colour, style in series:
        chosen = [r for r in rows if (r["engine"], r["algorithm"]) == (engine, algorithm)]
        chosen = [r for r in chosen if engine != "pymoo" or r["crossover"] == "two-point"]
        axis.plot(
            [r["n_weights"] for r in chosen],
            [r["seconds_per_generation"] for r in chosen],
            style,
            color=colour,
            label=label,
        )
    axis.set(xscale="log", yscale="log", xlabel="weights", ylabel="seconds per generation")
    axis.set_title("A generation of 100, without evaluation")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3, which="both")


def _evaluator(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """Images per second by depth and implementation."""
    ways = (
        ("_usual", "usual loop: eager float32, batch 1000", OTHER),
        ("_tuned", "tuned loop: eager bfloat16, channels last", MIDDLE),
        ("", "ours", OURS),
    )
    for i, (way, label, colour) in enumerate(ways):
        values = [row[f"images_per_second{way}"] for row in rows]
        bars = axis.bar([x + 0.27 * (i - 1) for x in range(len(rows))], values, 0.25, color=colour, label=label)
        axis.bar_label(bars, [f"{value:.0f}" for value in values], fontsize=7)
    axis.set_xticks(range(len(rows)), [f"ResNet-{row['depth']}" for row in rows])
    axis.set(ylabel="images per second, one core")
    axis.set_title("Evaluating one pruned network")
    axis.legend(fontsize=8)


def _search(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """Seconds of whole searches."""
    labels = [f"ResNet-{row['depth']}, seed {row['seed']}" for row in rows]
    for i, (key, label, colour) in enumerate(
        (("seconds_plain", "plain (hatched: extrapolated)", OTHER), ("seconds_ours", "ours", OURS))
    ):
        values = [row[key] for row in rows]
        bars = axis.barh([y + 0.38 * (i - 0.5) for y in range(len(rows))], values, 0.36, color=colour, label=label)
        for bar, row in zip(bars, rows, strict=True):
            if key == "seconds_plain" and row["plain"] != "run":
                bar.set(hatch="//", fill=False, edgecolor=colour)
        axis.bar_label(bars, [f"{value:.0f} s" for value in values], fontsize=8, padding=2)
    axis.set_yticks(range(len(rows)), labels)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set(xlabel="seconds, both phases")
    axis.set_title("A whole search, same seed and budget")
    axis.legend(fontsize=8)


def _growth(axis: Axes, rows: list[dict[str, Any]], x: str, y: str, colour: str, label: str | None = None) -> None:
    axis.plot([row["value"] for row in rows], [row["seconds"] for row in rows], "o-", color=colour, label=label)
    axis.set(xlabel=x, ylabel=y, xlim=(0, None), ylim=(0, None))
    axis.grid(alpha=0.3)


def table(results: dict[str, Any]) -> str:
    """The headline figures as a Markdown table."""
    engine = {(r["engine"], r["algorithm"], r["crossover"], r["n_weights"]): r for r in results["engine"]}
    million, ten = 1_000_000, 10_000_000
    lines = ["| what | plain | ours | ratio |", "|---|---|---|---|"]
    for name, theirs, ours in (
        ("guided moves against pymoo's defaults", "two-point", ("guided", "one-point")),
        ("uniform crossover and bit flips on both sides", "uniform", ("flat", "uniform")),
    ):
        peer, row = engine["pymoo", "nsga2", theirs, million], engine[ours[0], "nsga2", ours[1], million]
        lines.append(
            f"| generation of 100 masks of 10⁶ weights, {name}: time | {peer['seconds_per_generation']:.1f} s | "
            f"{1000 * row['seconds_per_generation']:.0f} ms | "
            f"{peer['seconds_per_generation'] / row['seconds_per_generation']:.0f}× |"
        )
        lines.append(
            f"| … extra peak memory | {peer['extra_peak_mb']:.0f} MB | {row['extra_peak_mb']:.0f} MB | "
            f"1/{peer['extra_peak_mb'] / row['extra_peak_mb']:.0f} |"
        )
    row = engine["guided", "nsga2", "one-point", ten]
    lines.append(
        f"| guided moves at 10⁷ weights: time; the population in memory | "
        f"| {1000 * row['seconds_per_generation']:.0f} ms; "
        f"{row['population_mb']:.0f} MB | |"
    )
    for row in results["evaluator"]:
        lines.append(
            f"| one ResNet-{row['depth']} candidate, one core: usual loop "
            f"| {row['images_per_second_usual']:.0f} images/s "
            f"| {row['images_per_second']:.0f} images/s | {row['ratio_usual']:.1f}× |"
        )
        lines.append(f"| … tuned loop | {row['images_per_second_tuned']:.0f} images/s | | {row['ratio_tuned']:.2f}× |")
    workers = results["workers"]
    lines.append(
        f"| {workers['candidates']} ResNet-{workers['depth']} candidates: two workers against one of ours | "
        f"{workers['seconds_workers_1']:.1f} s | {workers['seconds_workers_2']:.1f} s | {workers['scaling']:.2f}× |"
    )
    for row in results["search"]:
        difference = row.get("hypervolume_difference")
        told = f" (plain: {row['plain']})" if difference is None else f" (hypervolume {difference:+.4f})"
        lines.append(
            f"| whole search, ResNet-{row['depth']}, {row['evaluations']} candidates × {row['images']} images, seed "
            f"{row['seed']}{told} | {row['seconds_plain']:.0f} s | {row['seconds_ours']:.0f} s | "
            f"{row['speed_ratio']:.1f}× |"
        )
    return "\n".join(lines) + "\n"
