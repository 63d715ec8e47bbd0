"""Judging pruned networks: from masks to objectives, both minimised.

The evaluator chooses how to compute and checks its choice against the plain way on real images: fused where the network
can be traced (`evaluation.fused`), layer by layer otherwise (`evaluation.layerwise`); in bfloat16 where the machine
computes in it; in several processes (`evaluation.workers`); on a GPU as one recording (`evaluation.captured`).
"""

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from paretoprune.devices import computes_bfloat16, default_batch_size, out_of_memory, repeatable
from paretoprune.evaluation.captured import CapturedNetwork
from paretoprune.evaluation.fused import FusedNetwork
from paretoprune.evaluation.judging import OBJECTIVES, Judge, PrunableNetwork, Verdict
from paretoprune.evaluation.layerwise import LayerwiseNetwork
from paretoprune.evaluation.metrics import divergence_of, image_losses, predict, top1_error
from paretoprune.evaluation.prefixes import NO_PLAN, Plan, PrefixCache
from paretoprune.evaluation.workers import WorkerPool, can_fork, run_in_processes
from paretoprune.importance.curvature import DAMPING
from paretoprune.importance.layer_statistics import LayerStatistics, collect_statistics
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.architectures import channels_last, to_channels_last
from paretoprune.networks.tracing import NotTraceableError
from paretoprune.repair.batchnorm import REFITTING, REPAIRS
from paretoprune.repair.refit import Reconstruction, RefitCosts
from paretoprune.repair.sequential import Refined, Refinement

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Images on which a way to compute is compared with float32, layer by layer; and how far it may be off: share of
# answers that differ, and difference of the error. One image more than that is always allowed.
N_CHECKED = 256
TOLERANCES = {torch.float32: (0.01, 0.005), torch.bfloat16: (0.05, 0.02)}
# Density of the magnitude-pruned network that is compared beside the dense one, and that tells which images are hard.
CHECKED_DENSITY = 0.3
_LOGGER = logging.getLogger("paretoprune")
_Network = TypeVar("_Network", bound=FusedNetwork | LayerwiseNetwork)


@dataclass(frozen=True)
class Scores:
    """What one split says about some networks.

    Attributes:
        error: float64 (n_masks,), top-1 error, 0 to 1.
        divergence: float64 (n_masks,), 1 - exp(-KL) from the dense network's answers, 0 to 1.
    """

    error: np.ndarray
    divergence: np.ndarray

    def objective(self, name: str) -> np.ndarray:
        """The scores that the objective `name` (error or divergence) minimises, float64 (n_masks,)."""
        return self.error if name == "error" else self.divergence


class PopulationEvaluator:
    """Turns masks into objectives (error-like, density); equal masks always get equal objectives.

    Args:
        network: The trained dense network; it is copied and left as it is.
        layout: Where its prunable weights lie in a mask.
        images: Images to judge on, float32 (n, channels, height, width), normalised.
        labels: Their labels, int64 (n,).
        repair: What is put right before judging, a key of `repair.batchnorm.REPAIRS`.
        calibration_images: Images for the repair, normalised, in random order.
        repair_images: How many of them, the first, batch-norm statistics of each candidate are corrected on; None for
            all.
        statistics: For repair `reconstruct`, of the layers (`importance.layer_statistics`); None to collect them on the
            calibration images.
        damping: For repair `reconstruct`, see `importance.curvature.damped`.
        refine: For repair `reconstruct`, whether finished networks are re-fitted once more (`repair.sequential`).
        objective: `error` (top-1) or `divergence` (from the dense network's answers, see `divergence`).
        precision: `float32`, or `bfloat16` for weights and activations (statistics and scores are float32 either way),
            or `auto`: bfloat16 where the device computes in it.
        batch_size: Images per forward pass; None chooses by the size of the images.
        device: Where to compute.
        workers: Processes to judge with, on a CPU; results do not depend on it.
        prefix_cache_mb: Memory (MB) for activations of candidates, from which others that differ only in later layers
            are continued; results do not depend on it.

    Raises:
        ValueError: An option is unknown, or the dense network answers anything that is not finite.
    """

    def __init__(
        self,
        network: nn.Module,
        layout: WeightUnits,
        images: Tensor,
        labels: Tensor,
        *,
        repair: str,
        calibration_images: Tensor,
        repair_images: int | None = None,
        statistics: Mapping[str, LayerStatistics] | None = None,
        damping: float = DAMPING,
        refine: bool = True,
        objective: str = "error",
        precision: str = "auto",
        batch_size: int | None = None,
        device: str | torch.device = "cpu",
        workers: int = 1,
        prefix_cache_mb: int = 0,
    ) -> None:
        if objective not in OBJECTIVES:
            raise ValueError(f"expected an objective among {', '.join(OBJECTIVES)}, found '{objective}'")
        if precision not in (*PRECISIONS, "auto"):
            raise ValueError(f"expected a precision among {', '.join(PRECISIONS)} and auto, found '{precision}'")
        self.layout, self.objective = layout, objective
        self._device, self._repair = torch.device(device), repair
        self._original = copy.deepcopy(network).eval()
        if repair not in REPAIRS:
            raise ValueError(f"expected a repair mode among {', '.join(REPAIRS)}, found '{repair}'")
        self._calibration, self._all_calibration = calibration_images[:repair_images], calibration_images
        self._refine = refine
        self._damping, self._statistics = damping, self._known_statistics(statistics)
        self._reconstruction = self._prepare_reconstruction()
        self._refinement: Refinement | None = None
        self._plain: LayerwiseNetwork | None = None
        if precision == "auto":
            precision = "bfloat16" if computes_bfloat16(self._device) else "float32"
        batch_size = batch_size or default_batch_size(images, self._device)
        self._labels = labels.to(self._device)
        with repeatable(), torch.inference_mode():
            self._network, self._dtype = self._choose(images, PRECISIONS[precision])
            placed = self._place(images, self._dtype)
            dense = self._answers(self._network, placed, batch_size, None)
            order = self._hardest_first(placed, batch_size, dense)
            self._images, self._labels, dense = placed[order], self._labels[order], dense[order]
            # Indexing may lay images out anew.
            self._images = channels_last(self._images)
        self._dense_log_probabilities = functional.log_softmax(dense.double(), dim=1)
        self.dense = Scores(np.array([top1_error(dense, self._labels)]), np.zeros(1))
        on_cpu = self._device.type == "cpu"
        self.n_workers = max(1, workers) if on_cpu and can_fork() else 1
        n_calibration = len(self._calibration) if repair != "none" else 0
        budget = prefix_cache_mb * 2**20 if on_cpu else 0
        self.prefixes = PrefixCache(self._network.cuts, layout, len(images), n_calibration, self._dtype, budget)
        self._judge = Judge(
            self._network,
            self._images,
            self._labels,
            self._dense_log_probabilities,
            objective=objective,
            batch_size=batch_size,
            prefixes=self.prefixes,
        )
        self._pool: WorkerPool | None = None
        self._captured: CapturedNetwork | None = None
        self.n_images_seen = 0

    def _known_statistics(self, given: Mapping[str, LayerStatistics] | None) -> Mapping[str, LayerStatistics]:
        if self._repair not in REFITTING:
            return {}
        if given is not None:
            return given
        with repeatable():
            # Which positions are looked at is no part of a search's luck.
            return collect_statistics(self._original, self.layout, self._all_calibration, seed=0, device=self._device)

    def _prepare_reconstruction(self) -> Reconstruction | None:
        if self._repair not in REFITTING:
            return None
        return Reconstruction(self._original, self.layout, self._statistics, damping=self._damping, device=self._device)

    # --------------------------------------------------------------------------------------------- choosing the path

    def _place(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        return channels_last(images.to(self._device, dtype))

    def _answers(self, network: PrunableNetwork, images: Tensor, batch_size: int, mask: np.ndarray | None) -> Tensor:
        """Logits of all images under a mask bool (n_weights,); None is the full one."""
        kept = torch.ones(self.layout.n_weights, dtype=torch.bool) if mask is None else torch.from_numpy(mask)
        network.prepare(kept.to(self._device))
        return torch.cat([network.answer(batch) for batch in images.split(batch_size)])

    def _magnitude_mask(self) -> np.ndarray:
        """bool (n_weights,): the largest weights of each layer, as many as `CHECKED_DENSITY` says."""
        parameters = dict(self._original.named_parameters())
        parts = []
        for name, size in zip(self.layout.names, self.layout.sizes.tolist(), strict=True):
            magnitudes = parameters[name].detach().abs().reshape(-1).cpu().numpy()
            least = np.partition(magnitudes, int(size * (1 - CHECKED_DENSITY)))[int(size * (1 - CHECKED_DENSITY))]
            parts.append(magnitudes >= least)
        return np.concatenate(parts)

    def _reference(self) -> LayerwiseNetwork:
        """The plain way: float32, layer by layer."""
        if self._plain is None:
            self._plain = self._prepared(LayerwiseNetwork, self._calibration, torch.float32)
        return self._plain

    def _prepared(self, kind: type[_Network], sample: Tensor, dtype: torch.dtype) -> _Network:
        """The dense network ready to take masks in one of the ways to compute, repaired as asked for."""
        return kind(
            self._original,
            self.layout,
            self._place(sample, dtype),
            repair=self._repair,
            calibration_images=self._place(self._calibration, dtype),
            reconstruction=self._reconstruction,
        )

    def _choose(self, images: Tensor, dtype: torch.dtype) -> tuple[PrunableNetwork, torch.dtype]:
        """The fastest way to compute that agrees with the plain one, and its type."""
        reference = self._reference()
        checked, labels = self._place(images[:N_CHECKED], torch.float32), self._labels[:N_CHECKED]
        masks = [None, self._magnitude_mask()]
        expected = [self._answers(reference, checked, 64, mask) for mask in masks]
        if not bool(torch.isfinite(expected[0]).all()):
            raise ValueError(
                "the dense network's answers are not finite; check the checkpoint and its input normalisation"
            )
        ways: list[tuple[type[FusedNetwork] | type[LayerwiseNetwork], torch.dtype]] = [(FusedNetwork, dtype)]
        if dtype != torch.float32:
            ways.append((LayerwiseNetwork, dtype))
        for kind, tried in ways:
            name = f"{'fused' if kind is FusedNetwork else 'layer-by-layer'} {str(tried).removeprefix('torch.')} path"
            try:
                network = self._prepared(kind, images[:2], tried)
                found = [self._answers(network, checked.to(tried), 64, mask) for mask in masks]
            except NotTraceableError as error:
                _LOGGER.info("the %s does not take this network: %s", name, error)
                continue
            except Exception as error:  # the plain way has run, so the fault is not the network's
                if out_of_memory(error):
                    raise
                _LOGGER.warning(
                    "the %s fails on this network: %s", name, str(error).splitlines()[0] if str(error) else error
                )
                continue
            if self._agrees(name, found, expected, labels, TOLERANCES[tried]):
                return network, tried
        _LOGGER.info("candidates are evaluated in float32, layer by layer")
        return reference, torch.float32

    @staticmethod
    def _agrees(
        name: str, found: list[Tensor], expected: list[Tensor], labels: Tensor, tolerances: tuple[float, float]
    ) -> bool:
        """Whether answers are near enough to those of the plain way; says so."""
        differing = max(
            float((a.argmax(1) != b.argmax(1)).double().mean()) for a, b in zip(found, expected, strict=True)
        )
        shifts = [top1_error(a, labels) - top1_error(b, labels) for a, b in zip(found, expected, strict=True)]
        shift = max(shifts, key=abs)
        image = 1.01 / len(labels)
        good = differing <= tolerances[0] + image and abs(shift) <= tolerances[1] + image
        _LOGGER.log(
            logging.INFO if good else logging.WARNING,
            "%s against float32 layer by layer, dense and pruned, on %d images: %.1f %% of the answers agree, "
            "the error is %+.2f points off%s",
            name,
            len(labels),
            100 * (1 - differing),
            100 * shift,
            "" if good else "; that is too much, and it is not used",
        )
        return good

    def _hardest_first(self, images: Tensor, batch_size: int, dense: Tensor) -> Tensor:
        """Order of images in which a bad candidate's loss grows soonest."""
        log_probabilities = functional.log_softmax(dense.double(), dim=1)
        logits = self._answers(self._network, images, batch_size, self._magnitude_mask())
        if self.objective == "error":
            wrongly = logits.scatter(1, self._labels[:, None], -torch.inf).amax(dim=1)
            loss = (wrongly - logits.gather(1, self._labels[:, None])[:, 0]).nan_to_num()
        else:
            loss = image_losses(logits, self._labels, log_probabilities)[1]
        return loss.argsort(descending=True, stable=True)

    # ------------------------------------------------------------------------------------------------------- judging

    @property
    def precision(self) -> str:
        """What candidates are computed in, `float32` or `bfloat16`."""
        return str(self._dtype).removeprefix("torch.")

    @property
    def is_fused(self) -> bool:
        """Whether the network could be traced and the fused path agreed with the plain one."""
        return isinstance(self._network, FusedNetwork)

    @property
    def n_classes(self) -> int:
        """Number of classes that the network tells apart."""
        return self._dense_log_probabilities.shape[1]

    @property
    def images_and_labels(self) -> tuple[Tensor, Tensor]:
        """The images to judge on and their labels, on the evaluator's device, in its own order and type."""
        return self._images, self._labels

    def _verdicts(self, words: np.ndarray, bounds: Sequence[float]) -> list[Verdict]:
        """Judge candidates uint64 (n_masks, n_words), each up to its bound."""
        if self._device.type != "cpu" and isinstance(self._network, FusedNetwork) and self._network.can_be_recorded:
            if self._captured is None:
                with repeatable():
                    self._captured = CapturedNetwork(self._network, self._images, self._judge.batch_size)
            errors, kls = self._captured.losses(words, self._labels, self._dense_log_probabilities)
            self.n_images_seen += len(self._images) * len(words)
            return [
                Verdict(float(e), divergence_of(float(k)), len(self._images), True)
                for e, k in zip(errors, kls, strict=True)
            ]
        found: dict[int, Verdict] = {}
        plans: dict[int, Plan] = {}

        def arguments(i: int) -> tuple[np.ndarray, float, Plan]:
            plans[i] = self.prefixes.plan(words[i])
            return words[i], bounds[i], plans[i]

        def done(i: int, verdict: Verdict) -> None:
            self.prefixes.close(plans.pop(i, NO_PLAN), verdict.complete)
            found[i] = verdict

        try:
            if self.n_workers > 1 and len(words) > 1:
                if self._pool is None:
                    self.prefixes.allocate()
                    self._pool = WorkerPool(self._judge, self.n_workers)
                self._pool.run(range(len(words)), arguments, done)
            else:
                with repeatable():
                    for i in range(len(words)):
                        done(i, self._judge(*arguments(i)))
        except BaseException:
            self.close()
            raise
        self.n_images_seen += sum(verdict.n_seen for verdict in found.values())
        return [found[i] for i in range(len(words))]

    def score(self, masks: PackedMasks) -> Scores:
        """Judge each mask's pruned and repaired network."""
        verdicts = self._verdicts(masks.words, [math.inf] * len(masks))
        return Scores(np.array([v.error for v in verdicts]), np.array([v.divergence for v in verdicts]))

    def __call__(self, masks: PackedMasks) -> np.ndarray:
        """Losses float64 (n_masks,): errors or divergences, as the objective says."""
        return self.bounded(masks, np.full(len(masks), math.inf))[0]

    def bounded(self, masks: PackedMasks, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Judge masks, each only until its error-like objective is certain to lie above its bound.

        Args:
            masks: What is judged.
            bounds: float (n_masks,); infinite to judge on all images.

        Returns:
            Losses float64 (n_masks,), and whether each was judged on all images, bool (n_masks,): where not, the loss
            is a lower bound, larger than the given bound.
        """
        verdicts = self._verdicts(masks.words, np.asarray(bounds, dtype=np.float64).tolist())
        losses = np.array([v.error if self.objective == "error" else v.divergence for v in verdicts])
        return losses, np.array([v.complete for v in verdicts], dtype=bool)

    @property
    def reconstruction(self) -> Reconstruction | None:
        """What re-fits the weights of candidates; None unless the repair does."""
        return self._reconstruction

    @property
    def statistics(self) -> Mapping[str, LayerStatistics]:
        """Statistics of the layers that `reconstruction` works with; empty without it."""
        return self._statistics

    def refit_costs(self) -> RefitCosts:
        """What re-fitting says of each weight of a candidate, for a guide of moves.

        Raises:
            ValueError: The evaluator does not re-fit.
        """
        if self._reconstruction is None:
            raise ValueError("a guide by re-fitted costs needs repair 'reconstruct'; choose it, or other guides")
        return RefitCosts(self._reconstruction, self._statistics)

    def precompute(self, masks: PackedMasks) -> None:
        """Re-fit the layers of some masks ahead: candidates made of them find them, in every process."""
        if self._reconstruction is None:
            return
        self._stop_workers()
        with repeatable(), torch.inference_mode():
            for i in range(len(masks)):
                self._reconstruction(torch.from_numpy(masks.unpack(i)).to(self._device))

    def _prepare_refinement(self) -> Refinement | None:
        """Ready the sequential re-fit of networks; None where the repair or the network has none."""
        if self._reconstruction is None:
            return None
        if self._refinement is None:
            images = self._place(self._all_calibration, torch.float32)
            try:
                original = copy.deepcopy(self._original).to(self._device).float()
                self._refinement = Refinement(original, self.layout, images, self._statistics, damping=self._damping)
            except NotTraceableError as error:
                _LOGGER.warning(
                    "finished networks keep the weights that each layer was given on the dense network's inputs: %s",
                    error,
                )
        return self._refinement

    def _refined(self, mask: np.ndarray, *, reselect: bool) -> Refined:
        """The re-fitted network of one mask bool (n_weights,), once it is clear that networks can be refined."""
        assert self._refinement is not None
        assert self._reconstruction is not None
        kept = torch.from_numpy(mask).to(self._device)
        with repeatable(), torch.inference_mode():
            return self._refinement(kept, self._reconstruction(kept), reselect=reselect)

    def build(self, mask: np.ndarray) -> nn.Module:
        """The pruned and repaired network of one mask, as an independent module on the CPU, in evaluation mode.

        It is made in float32, whatever the evaluator judges in. With repair `reconstruct` it is re-fitted once more,
        layer by layer, see `repair.sequential`.

        Args:
            mask: bool (n_weights,).
        """
        if self._refine and self._prepare_refinement() is not None:
            return self._refined(mask, reselect=False).network
        with repeatable(), torch.inference_mode():
            pruned = self._reference()
            pruned.prepare(torch.from_numpy(mask).to(self._device))
        network = copy.deepcopy(self._original)
        network.load_state_dict(pruned.network.state_dict())
        return network

    def measure(self, network: nn.Module) -> tuple[float, float]:
        """Error and divergence of a finished network on the images, in float32."""
        network = to_channels_last(copy.deepcopy(network).to(self._device))
        with repeatable(), torch.inference_mode():
            logits = predict(network, self._images.float(), 64)
            wrong, kl = image_losses(logits, self._labels, self._dense_log_probabilities)
        return int(wrong.sum()) / len(wrong), divergence_of(float(kl.sum()) / len(kl))

    def finish(
        self, masks: PackedMasks, *, reselect: bool = False
    ) -> tuple[PackedMasks, list[dict[str, Tensor]], Scores]:
        """Build the networks of masks and measure them, in the evaluator's processes.

        Args:
            masks: What is built.
            reselect: Where networks are refined, also choose each layer's weights anew on the pruned network's own
                inputs (`reselect`), and keep of the two networks the one with the smaller objective.

        Returns:
            The masks, with `reselect` perhaps others that keep as many weights of each layer; the state of each
            network, on the CPU; and what the images say of it.
        """

        def finish_one(i: int) -> tuple[np.ndarray, dict[str, np.ndarray], float, float]:
            mask = masks.unpack(i)
            tried = [(mask, self.build(mask))]
            if anew and not mask.all():
                refined = self._refined(mask, reselect=True)
                tried.append((refined.kept.cpu().numpy(), refined.network))
            measured = [self.measure(network) for _, network in tried]
            at = ("error", "divergence").index(self.objective)
            best = min(range(len(tried)), key=lambda j: measured[j][at])
            state = {key: value.numpy() for key, value in tried[best][1].state_dict().items()}
            return tried[best][0], state, *measured[best]

        anew = self._refine and self._prepare_refinement() is not None and reselect
        found = self._in_processes(finish_one, len(masks))
        states = [{key: torch.from_numpy(value) for key, value in state.items()} for _, state, _, _ in found]
        scores = Scores(np.array([e for *_, e, _ in found]), np.array([d for *_, d in found]))
        return PackedMasks.pack_each((mask for mask, *_ in found), masks.n_units), states, scores

    def reselect(self, masks: PackedMasks) -> PackedMasks:
        """Masks that keep as many weights of each layer, chosen anew on the pruned network's own inputs.

        See `repair.sequential`; masks come back as they are where networks cannot be refined.
        """
        if self._prepare_refinement() is None:
            return masks

        def reselect_one(i: int) -> np.ndarray:
            return self._refined(masks.unpack(i), reselect=True).kept.cpu().numpy()

        return PackedMasks.pack_each(self._in_processes(reselect_one, len(masks)), masks.n_units)

    def _in_processes(self, function: Callable[[int], Any], n: int) -> list[Any]:
        """Results of a function for 0, ..., n - 1, in as many processes as the evaluator has."""
        self._stop_workers()
        return run_in_processes(function, n, self.n_workers)

    def _stop_workers(self) -> None:
        """End the processes that judge: what is prepared from now on must be there when they start."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def close(self) -> None:
        """End the worker processes, let go of kept activations and recordings; all come back when they are needed."""
        self._stop_workers()
        self.prefixes.forget()
        self._captured = None

    def __enter__(self) -> "PopulationEvaluator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
