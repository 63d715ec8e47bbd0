"""NVIDIA ModelOpt's FastNAS on the same network and images: `python -m benchmarks.channels.fastnas`.

ModelOpt is no dependency of this project. Make an environment with this package, `nvidia-modelopt`, `requests`,
`huggingface_hub` and `torchprofile==0.0.4`, which it imports, and run this with its interpreter. Rows are added to
`channels.json`.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paretoprune.copies import copied
from paretoprune.evaluation.metrics import predict, top1_error
from paretoprune.structured.units import ChannelUnits
from torch import Tensor, nn

from benchmarks.channels import measuring, report
from benchmarks.channels.__main__ import FOLDER, LEVELS, NETWORKS
from benchmarks.channels.choices import Choice
from benchmarks.channels.results import Results
from benchmarks.channels.subject import Subject, experiment, prepared

PART, TOOL = "fastnas", "ModelOpt FastNAS"
# It keeps the last 50 batches to recalibrate batch norms on, and insists on as many.
N_BATCHES = 50
_LOGGER = logging.getLogger("benchmarks")


class Fastnas:
    """FastNAS for one subject.

    Args:
        subject: What is pruned.
        divisor: Numbers of channels are multiples of it; None for the tool's own 32.
        checkpoint: File in which it keeps what it has measured for one level for the next.
        n_images: Search images that candidates are measured on.
    """

    def __init__(self, subject: Subject, divisor: int | None, checkpoint: Path, n_images: int) -> None:
        self._subject, self._checkpoint, self._n_images = subject, checkpoint, n_images
        self._divisor = divisor
        self.n_evaluations = 0

    def __call__(self, level: float) -> nn.Module:
        """A pruned network that removes at least a share of the multiply-adds, as it comes.

        Raises:
            ValueError: The tool finds none.
        """
        import modelopt.torch.prune as mtp

        settings: dict[str, Any] = mtp.fastnas.FastNASConfig().model_dump()
        if self._divisor is not None:
            settings["nn.Conv2d"]["*"]["channel_divisor"] = self._divisor
            settings["nn.BatchNorm2d"]["*"]["feature_divisor"] = self._divisor
        calibration = self._subject.calibration.images
        network, _ = mtp.prune(
            copied(self._subject.network),
            mode=[("fastnas", settings)],
            constraints={"flops": f"{100 * (1 - level):g}%"},
            dummy_input=self._subject.search.images[:1],
            config={
                "score_func": self._score,
                "data_loader": [(batch,) for batch in calibration.split(len(calibration) // N_BATCHES)],
                "collect_func": lambda batch: batch[0],
                "checkpoint": str(self._checkpoint),
            },
        )
        pruned: nn.Module = network.eval()
        return pruned

    def _score(self, network: nn.Module) -> float:
        self.n_evaluations += 1
        search = self._subject.search.first(self._n_images)
        return 1.0 - top1_error(predict(network, search.images, measuring.BATCH_SIZE), search.labels)


def mask_of_network(units: ChannelUnits, whole: nn.Module, small: nn.Module) -> np.ndarray:
    """Which units a network keeps whose channels may be in another order, by the values of its batch norms.

    Args:
        units: What can be cut.
        whole: The whole network.
        small: The same modules with fewer channels, their parameters unchanged.

    Returns:
        bool (n_units,).

    Raises:
        ValueError: A parameter is not that of the whole network without some units.
    """
    before, after = dict(whole.named_parameters()), dict(small.named_parameters())
    bits, taken = [], dict[tuple[str, int], np.ndarray]()
    for coupling in units.couplings:
        norm = next(
            part
            for part in coupling.parts
            if part.tensor.endswith(".weight") and part.tensor in before and before[part.tensor].ndim == 1
        )
        order = _places(norm.tensor, before, after)
        kept = np.zeros(coupling.n_units, dtype=bool)
        kept[norm.unit_of[order]] = True
        bits.append(kept)
        # In the same order wherever these channels are: an axis of the same length as the norm's.
        taken |= {(part.tensor, part.axis): order for part in coupling.parts if part.tensor in before}
    for name, parameter in before.items():
        expected = parameter.detach()
        for axis in range(parameter.ndim):
            if (name, axis) in taken:
                expected = expected.index_select(axis, torch.from_numpy(taken[name, axis]))
        if not torch.equal(expected, after[name].detach()):
            raise ValueError(f"expected '{name}' to be that of the whole network without some units")
    return np.concatenate(bits)


def _places(norm: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> np.ndarray:
    """Channels of the whole network that the channels of a smaller norm come from, int64 (n_kept,)."""
    names = (norm, f"{norm.removesuffix('weight')}bias")
    old, new = (torch.stack([tensors[name].detach() for name in names], dim=1) for tensors in (before, after))
    same = (old[None] == new[:, None]).all(dim=2).numpy()
    if not (same.sum(axis=1) == 1).all():
        raise ValueError(f"expected each channel of '{norm}' to be one of the whole network's")
    return np.asarray(same.argmax(axis=1), dtype=np.int64)


def main() -> None:
    """Measure FastNAS at every level, as it comes and with our repair of the same channels."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.channels.fastnas", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="cifar10-sample.tar and checkpoints/")
    parser.add_argument("--network", choices=NETWORKS, default="resnet56")
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS, help="shares of multiply-adds to remove")
    parser.add_argument("--divisor", type=int, default=4, help="numbers of channels are multiples of it")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder with channels.json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)
    subject = prepared(NETWORKS[arguments.network], arguments.data)
    n_images = experiment()["search"]["candidate_images"]
    about: dict[str, Any] = {"version": version("nvidia-modelopt"), "divisor": arguments.divisor}
    with tempfile.TemporaryDirectory() as folder:
        try:
            Fastnas(subject, None, Path(folder) / "default.pth", n_images)(min(arguments.levels))
        except ValueError as error:
            about["with_default_settings"] = str(error)
        _LOGGER.info("with its default settings: %s", about.get("with_default_settings", "it runs"))
        start = time.perf_counter()
        fastnas = Fastnas(subject, arguments.divisor, Path(folder) / "search.pth", n_images)
        found = []
        for level in sorted(arguments.levels):
            network = fastnas(level)
            bits = mask_of_network(subject.units, subject.network, network)
            n_tried = fastnas.n_evaluations
            found.append((network, Choice(TOOL, "sensitivity", "searched", level, bits, tried=n_tried)))
            _LOGGER.info("%.0f %%: %d evaluations, %.0f s", 100 * level, n_tried, time.perf_counter() - start)
    about |= {"evaluations": fastnas.n_evaluations, "seconds": round(time.perf_counter() - start)}
    dense = measuring.accuracy(subject.network, subject.test)
    facts = {"fingerprint": subject.fingerprint, "n_test": len(subject.test), "dense": dense, "fastnas": about}
    results = Results(arguments.output, arguments.network, facts)
    rows = [measuring.row(subject, choice, "its own", network) for network, choice in found]
    results.replace(PART, rows, arguments.levels)
    rows += measuring.measure(subject, [choice for _, choice in found], ("none", "batchnorm", "reconstruct"))
    results.replace(PART, rows, arguments.levels)
    report.write(results.path)


if __name__ == "__main__":
    main()
