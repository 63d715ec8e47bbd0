"""Try what can be cut of the networks of torchvision and timm: `make channels`, hours on one core.

Each network runs in a process of its own with a limit of time and memory. Results go to docs/results/channels.csv,
a row a network; rows that are there are kept. The table of docs/channels-networks.md is written from them.
`--units-only` leaves out re-fits and exports.
"""

import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS = Path(__file__).parent / "results" / "channels.csv"
PAGE = Path(__file__).with_name("channels-networks.md")
BEGIN, END = "<!-- table: make channels -->\n", "<!-- end of table -->\n"
FIELDS = (
    "network", "image", "seconds", "groups", "units", "branches", "macs", "parameters", "slim_macs", "difference",
    "refit", "pt2", "onnx", "stayed",
)  # fmt: skip
# Without re-fits and exports.
UNITS_ONLY = "--units-only"
SECONDS, BYTES = 420, 6 * 2**30
# Of these families all is tried; of the others how units are found, and what a cut network answers.
EXPORTED = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18",
    "resnet50", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vgg11_bn",
    "vit_b_32", "wide_resnet50_2",
)  # fmt: skip
TIMM = (
    "resnet10t", "convnext_atto", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224",
    "gmlp_ti16_224", "efficientnet_lite0", "mobilenetv3_small_050", "regnetx_002", "dm_nfnet_f0", "levit_128s",
    "convnextv2_atto", "eva02_tiny_patch14_224", "beit_base_patch16_224", "vit_small_patch16_dinov3", "poolformer_s12",
    "ghostnet_050", "repvgg_a0", "maxvit_pico_rw_256", "edgenext_xx_small", "mobilevit_xxs", "xcit_nano_12_p8_224",
)  # fmt: skip
# Too large for the limits; smaller ones of their families stand for them.
LEFT_OUT = ("regnet_y_128gf", "vit_h_14")


def main() -> None:
    """Survey all networks, or those that are named, one after the other."""
    names, tries_all = [name for name in sys.argv[1:] if not name.startswith("--")], UNITS_ONLY not in sys.argv
    if "--one" in sys.argv:
        print(json.dumps(survey(names[0], tries_all=tries_all)))
        return
    from torchvision import models

    named = bool(names)
    if not names:
        # Those of which all is tried come first.
        every = [*EXPORTED, *(f"timm/{name}" for name in TIMM), *models.list_models(module=models)]
        names = [name for name in dict.fromkeys(every) if name not in LEFT_OUT]
    rows = {row["network"]: row for row in read_rows()}
    for name in names:
        if name in rows and not named:
            continue
        rows[name] = run_one(name, tries_all=tries_all)
        print(json.dumps(rows[name]), flush=True)
        write_rows(list(rows.values()))
        write_page()


def run_one(name: str, *, tries_all: bool) -> dict[str, Any]:
    """One network in a process of its own."""
    command = [sys.executable, __file__, "--one", name, *([] if tries_all else [UNITS_ONLY])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"network": name, "stayed": f"not finished within {SECONDS} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return {"network": name, "stayed": lines[-1]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def survey(name: str, *, tries_all: bool) -> dict[str, Any]:
    """All that is asked of one network."""
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    import torch
    from cut_networks import (
        build,
        difference,
        images_of,
        shape_of,
        shares_in_groups,
        silenced,
        some_bits,
        without_norms_of_all,
    )
    from paretoprune.copies import copied
    from paretoprune.masks.packed import PackedMasks
    from paretoprune.structured.units import ChannelUnits, slim_costs

    torch.set_num_threads(1)
    network, images = build(name), images_of(name, 4)
    row: dict[str, Any] = {"network": name, "image": shape_of(name).size}
    start = time.process_time()
    try:
        units = ChannelUnits.of(network, images[:1])
    except ValueError as error:
        return row | {"seconds": round(time.process_time() - start, 1), "stayed": str(error)}
    row["seconds"] = round(time.process_time() - start, 1)
    row |= {"groups": units.n_groups, "units": units.n_units}
    row["branches"] = sum(one.may_vanish for one in units.couplings)
    row["macs"], row["parameters"] = (round(share, 4) for share in shares_in_groups(network, units, images[:1]))
    bits = some_bits(units)
    (cost,) = slim_costs(["macs"], units, network, images[:1])
    row["slim_macs"] = round(float(cost.of(PackedMasks.pack_each([bits], units.n_units))[0]), 4)
    comparable = without_norms_of_all(units, bits)
    with torch.no_grad():
        whole = copied(network).double()
        found = units.slim(whole, comparable)(images.double())
        blind = silenced(whole, units.couplings, units.split(comparable))
        row["difference"] = f"{difference(found, blind(images.double())):.1e}"
        del whole, blind
    small = units.slim(network, bits)
    row["stayed"] = "; ".join(f"{layer}: {reason}" for layer, reason in units.refused.items())
    if tries_all and (name in EXPORTED or name.startswith("timm/")):
        with tempfile.TemporaryDirectory() as folder:
            tried = steps(network, small, units, images, bits, Path(folder))
            row |= {key: outcome(step) for key, step in tried.items()}
    return row


def steps(network: Any, small: Any, units: Any, images: Any, bits: Any, folder: Path) -> dict[str, Callable[[], Any]]:
    """What else has to work, each a function that raises where it does not."""
    from paretoprune.deployment.export import export_onnx, export_pt2
    from paretoprune.structured.refit import SlimRefit

    widest = max(parameter[0].numel() for parameter in network.parameters() if parameter.ndim > 1)
    if widest > 10_000:

        def refit() -> Any:
            raise ValueError(f"a layer of {widest} inputs for each row: not tried")
    else:

        def refit() -> Any:
            return SlimRefit(network, units, images)(bits)

    return {
        "refit": refit,
        "pt2": lambda: export_pt2(small, images, folder / "small.pt2"),
        "onnx": lambda: export_onnx(small, images, folder / "small.onnx"),
    }


def outcome(step: Callable[[], Any]) -> str:
    """`yes`, or why not."""
    try:
        step()
    except Exception as error:  # whatever a step raises is its outcome
        return (str(error).splitlines() or [type(error).__name__])[0][:200]
    return "yes"


def read_rows() -> list[dict[str, Any]]:
    """What is there."""
    if not ROWS.exists():
        return []
    with ROWS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(rows: list[dict[str, Any]]) -> None:
    """Write the table anew."""
    with ROWS.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def table() -> str:
    """The rows as a table, in Markdown; without the columns that no row has anything in."""
    rows = read_rows()
    columns = {title: [cell(row) for row in rows] for title, cell in COLUMNS.items()}
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    lines = [list(columns), ["---"] * len(columns), *(list(cells) for cells in zip(*columns.values(), strict=True))]
    return "".join(f"|{'|'.join(line)}|\n" for line in lines)


def percent(name: str) -> Callable[[dict[str, Any]], str]:
    """A share of a row as a cell."""
    return lambda row: f"{100 * float(row[name]):.0f}%" if row[name] else ""


def whether(name: str) -> Callable[[dict[str, Any]], str]:
    """What became of a step as a cell."""
    return lambda row: row[name] if row[name] in ("", "yes") else "no"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "network": lambda row: row["network"],
    "image": lambda row: row["image"],
    "multiply-adds": percent("macs"),
    "parameters": percent("parameters"),
    "groups": lambda row: row["groups"],
    "branches": lambda row: row["branches"],
    "half": percent("slim_macs"),
    "difference": lambda row: row["difference"],
    "CPU s": lambda row: f"{float(row['seconds']):.0f}" if row["seconds"] else "",
    "re-fit": whether("refit"),
    ".pt2": whether("pt2"),
    "ONNX": whether("onnx"),
    "failed": lambda row: "" if row["macs"] else row["stayed"][:80].replace("|", "/"),
}


def write_page() -> None:
    """Put the table into its page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table()}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
