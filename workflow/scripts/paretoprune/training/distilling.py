"""Distillation: a finished network is trained further to answer as the dense network does; labels are not needed."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from paretoprune.copies import copied
from paretoprune.data.datasets import check_augmentation
from paretoprune.data.mixing import mixed
from paretoprune.devices import plain_modes
from paretoprune.evaluation.metrics import divergence
from paretoprune.networks.architectures import channels_last, to_channels_last
from paretoprune.telling import Telling
from paretoprune.training.loop import Recipe, augment, learning_rate

DISTILLING_COLUMNS = ("stage", "rate", "step", "n_steps", "learning_rate", "loss", "divergence")
# Rates that are tried, the likeliest first: of two equally good ones the first is taken.
RATES = (0.0003, 0.0001, 0.001)
BATCH_SIZE = 64
# Answers to images that the dense network was trained on are almost sure; softened, they say more.
TEMPERATURE = 4.0
# Share of the leading image in the mixtures that are trained on.
MIXED_SHARES = 0.5, 1.0
# Share of all steps that the trial of one rate gets, at most, and that all trials get together.
TRIAL_SHARE, TRIALS_SHARE = 0.1, 0.5
# Share of a run in which the rate rises.
WARMUP = 0.1
# Orders and augmentations of all images that come in turn; the dense network answers to each of them once.
N_VIEWS = 8
# Steps that are timed, after a first one that is not.
N_TIMED = 4
# Rows of the history in a run.
N_ROWS = 10
_LOGGER = logging.getLogger("paretoprune")


@dataclass(frozen=True)
class Distilled:
    """What distillation made of a network.

    Attributes:
        network: The better one of before and after, in evaluation mode, on the CPU.
        before: Divergence of the network as it was given from the dense network, on the search images or mixtures of
            them, 0 to 1.
        after: Divergence of the network as it was trained.
        rate: The learning rate that short trials chose.
        n_steps: Steps in all, those of trials included: given as `n_steps`, they give the same network again.
        history: Rows with the keys `DISTILLING_COLUMNS`; the last one of each trial, and of the run after them
            (`stage` is `final`), says the divergence.
    """

    network: nn.Module
    before: float
    after: float
    rate: float
    n_steps: int
    history: list[dict[str, Any]]

    @property
    def is_trained(self) -> bool:
        """Whether the network is the trained one; otherwise it is the one that was given, bit for bit."""
        return self.after < self.before


@plain_modes()
def distil(
    network: nn.Module,
    dense: nn.Module,
    images: Tensor,
    *,
    search_images: Tensor,
    seed: int,
    n_steps: int | None = None,
    budget_seconds: float | None = None,
    rates: Sequence[float] = RATES,
    crop: int = 0,
    flip: bool = False,
    mix: bool = True,
    batch_size: int = BATCH_SIZE,
    device: torch.device | str = "cpu",
    log: logging.Logger = _LOGGER,
    progress: Callable[[int, int], None] | None = None,
) -> Distilled:
    """Train a copy of a network towards the answers of the dense one, and keep the better of before and after.

    Adam, with a short rise of the rate and half a cosine. Everything is computed in evaluation mode: batch norms
    normalise by the statistics that the network came with, which a repair has set, and nothing is dropped out. The
    rate is the one whose short trial, a whole schedule, ends with the least divergence on the search images. Weights
    that are 0 stay 0, so that a network that is pruned by a mask stays so. Equal calls with `n_steps` give equal
    networks on one machine.

    Images are mixed in pairs, both to train and to measure on: the dense network answers to images that it was trained
    on almost surely, which says little about others.

    Args:
        network: Network to train, slim or masked; it is left as it is.
        dense: Network whose answers are the targets; it is left as it is.
        images: float32 (n, ...), normalised, to train on.
        search_images: Images to measure on; no test images, as rate and result are chosen by them.
        seed: Fixes order and augmentation.
        n_steps: Steps in all, those of trials included.
        budget_seconds: Instead of it, seconds that everything may take, which a few timed steps turn into steps.
        rates: Learning rates to try, peaks of the schedule; a single one is taken without a trial.
        crop: Pixels of zero padding from which a random crop is taken; 0 for none.
        flip: Whether images are mirrored left to right half of the time.
        mix: Whether images are mixed in pairs, see `data.mixing`.
        batch_size: Images per step.
        device: Where to compute.
        log: Told of the progress, at least every ten seconds unless a single step takes longer.
        progress: Called after each step with the steps done and those in all.

    Raises:
        ValueError: There are no images, no rates, not exactly one of steps and seconds, or too few of them; or the two
            networks do not answer alike.

    Source:
        Hinton et al., "Distilling the knowledge in a neural network", 2015, without the labels; on mixtures as in
        Beyer et al., "Knowledge distillation: A good teacher is patient and consistent", 2022.
    """
    started = time.monotonic()
    _check(images, search_images, rates, n_steps, budget_seconds, batch_size)
    check_augmentation(images, crop, flip)
    lines, device = Telling("distil", log), torch.device(device)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        views = _Views(dense, images, batch_size, _Augmentation(crop, flip, mix), seed, device)
        if mix:
            search_images = mixed(search_images, torch.Generator().manual_seed(0))
        judge = _Judge(views, search_images, lines)
        begun = time.monotonic()
        before = judge(to_channels_last(copied(network).to(device).eval()))
        if n_steps is None:
            assert budget_seconds is not None  # by _check
            clock = _Clock(network, views, len(rates), time.monotonic() - begun)
            n_steps = clock.steps_within(budget_seconds - (time.monotonic() - started), budget_seconds)
            log.info("distil: %d steps fit into %g seconds", n_steps, budget_seconds)
        run = _Run(network, views, judge, lines, n_steps, progress)
        n_trial = trial_steps(n_steps, len(rates))
        tried = {rate: run(rate, n_trial, "trial")[1] for rate in rates} if len(rates) > 1 else {rates[0]: before}
        rate = min(tried, key=lambda rate: tried[rate])
        trained, after = run(rate, n_steps - run.done, "final")
    log.info(
        "distil: divergence on the search images %.4f before, %.4f after %d steps, rate %g; the network is kept as it "
        "%s",
        before,
        after,
        n_steps,
        rate,
        "was trained" if after < before else "was given",
    )
    kept = trained if after < before else copied(network)
    kept = kept.to("cpu").to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return Distilled(kept.eval(), before, after, rate, n_steps, run.history)


def trial_steps(n_steps: int, n_rates: int) -> int:
    """Steps of the trial of one rate, of `n_steps` in all; none where there is no choice."""
    if n_rates < 2:
        return 0
    return max(1, int(n_steps * min(TRIAL_SHARE, TRIALS_SHARE / n_rates)))


def _check(
    images: Tensor,
    search_images: Tensor,
    rates: Sequence[float],
    n_steps: int | None,
    budget_seconds: float | None,
    batch_size: int,
) -> None:
    if not len(images) or not len(search_images):
        raise ValueError(
            f"expected images to train and to measure on, found {len(images)} images and {len(search_images)} search "
            "images; give both, no test images among them"
        )
    if not rates or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise ValueError(f"expected `rates` above 0, at least one, found {list(rates)}; give some, such as {RATES}")
    if (n_steps is None) == (budget_seconds is None):
        raise ValueError(
            f"expected one of `n_steps` and `budget_seconds`, found {n_steps} and {budget_seconds}; give one"
        )
    if n_steps is not None and n_steps < _least_steps(len(rates)):
        raise ValueError(
            f"expected at least {_least_steps(len(rates))} steps to try {len(rates)} rates and to train, found "
            f"{n_steps}; give more steps"
        )
    if budget_seconds is not None and not 0 < budget_seconds < math.inf:
        raise ValueError(f"expected `budget_seconds` above 0, found {budget_seconds}; give seconds, such as 180")
    if batch_size < 1:
        raise ValueError(f"expected a `batch_size` of at least 1, found {batch_size}; give one, such as {BATCH_SIZE}")


def _least_steps(n_rates: int) -> int:
    return 1 if n_rates < 2 else n_rates + 1


@dataclass(frozen=True)
class _Augmentation:
    """What is done to images at random, see `distil`."""

    crop: int
    flip: bool
    mix: bool

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        images = augment(images, self.crop, self.flip, generator)
        return mixed(images, generator, MIXED_SHARES) if self.mix else images


class _Views:
    """Batches of images in some order, augmented, with what the dense network answers to them.

    Batch i is the same whenever it is asked for: trials of several rates see the same images, and the dense network
    answers to them once.
    """

    def __init__(
        self,
        dense: nn.Module,
        images: Tensor,
        batch_size: int,
        augmentation: _Augmentation,
        seed: int,
        device: torch.device,
    ) -> None:
        self.device, self.batch_size = device, batch_size
        self._images, self._augmentation, self._seed = images, augmentation, seed
        self._teacher = to_channels_last(copied(dense).to(device).eval().requires_grad_(False))
        self._targets: dict[tuple[int, int], Tensor] = {}
        self.n_batches = -(-len(images) // batch_size)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Images of a step, and the dense network's logits."""
        view, i = step // self.n_batches % N_VIEWS, step % self.n_batches
        order = self._generator(view, 0)
        indices = torch.randperm(len(self._images), generator=order)[i * self.batch_size : (i + 1) * self.batch_size]
        found = self._images[indices.to(self._images.device)].to(self.device)
        x = channels_last(self._augmentation(found, self._generator(view, 1 + i)))
        if (view, i) not in self._targets:
            self._targets[view, i] = self.answers(x)
        return x, self._targets[view, i]

    def answers(self, x: Tensor) -> Tensor:
        """The dense network's logits, float32 (n, n_classes)."""
        with torch.no_grad():
            return self._teacher(x).float()

    def _generator(self, view: int, i: int) -> torch.Generator:
        return torch.Generator().manual_seed((self._seed * 1_000_003 + view) * 1_000_003 + i)


class _Judge:
    """Divergence of networks from the dense one, on the search images."""

    def __init__(self, views: _Views, images: Tensor, lines: Telling) -> None:
        self._lines = lines
        self._batches = [channels_last(x.to(views.device)) for x in images.split(views.batch_size)]
        dense = torch.cat([self._answer(i, views.answers) for i in range(len(self._batches))])
        self._log_probabilities = functional.log_softmax(dense.double(), dim=1)

    def __call__(self, network: nn.Module) -> float:
        with torch.no_grad():
            logits = torch.cat([self._answer(i, network).float() for i in range(len(self._batches))])
        if logits.shape != self._log_probabilities.shape:
            raise ValueError(
                f"expected logits of shape {tuple(self._log_probabilities.shape)} as the dense network answers, found "
                f"{tuple(logits.shape)}; give the network that this one was made of"
            )
        return divergence(logits, self._log_probabilities)

    def _answer(self, i: int, network: Callable[[Tensor], Tensor]) -> Tensor:
        self._lines("measuring, batch %d of %d", i + 1, len(self._batches))
        return network(self._batches[i])


class _Student:
    """A copy of a network in training."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.network = to_channels_last(copied(network).to(device).eval())
        self._needed = {name: parameter.requires_grad for name, parameter in self.network.named_parameters()}
        self.network.requires_grad_(True)
        parameters = list(self.network.parameters())
        self._zero = [(p, p.detach() == 0) for p in parameters if p.ndim > 1 and bool((p == 0).any())]
        self._optimiser = torch.optim.Adam(parameters, lr=0.0)

    def step(self, x: Tensor, target: Tensor, rate: float) -> float:
        """One step of the optimiser, unless the loss is not finite; the loss."""
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        loss = soft_loss(self.network(x).float(), target)
        found = float(loss.detach())
        if math.isfinite(found):
            self._optimiser.zero_grad()
            loss.backward()
            self._optimiser.step()
            with torch.no_grad():
                for parameter, zero in self._zero:
                    parameter.masked_fill_(zero, 0.0)
        return found

    def finished(self) -> nn.Module:
        """The network without gradients, as it was found."""
        self._optimiser.zero_grad()
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(self._needed[name])
        return self.network


def soft_loss(logits: Tensor, target: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Divergence (nats) of softened answers from softened targets, the mean of all images, times temperature squared.

    Args:
        logits: float (n, n_classes).
        target: float (n, n_classes), logits of the dense network.
        temperature: Divides all logits; the factor makes up for the smaller gradients.
    """
    wanted = functional.log_softmax(target / temperature, dim=1)
    found = functional.log_softmax(logits / temperature, dim=1)
    return functional.kl_div(found, wanted, reduction="batchmean", log_target=True) * temperature**2


class _Run:
    """Trains copies of one network, at one rate after the other.

    Attributes:
        done: Steps so far.
        history: Rows so far.
    """

    def __init__(
        self,
        network: nn.Module,
        views: _Views,
        judge: _Judge,
        lines: Telling,
        n_steps: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._network, self._views, self._judge, self._lines = network, views, judge, lines
        self._n_steps, self._progress = n_steps, progress
        self._started = time.monotonic()
        self.done = 0
        self.history: list[dict[str, Any]] = []

    def __call__(self, rate: float, n_steps: int, stage: str) -> tuple[nn.Module, float]:
        """A copy trained at a rate by a whole schedule, and its divergence; infinite where the loss is not finite."""
        student = _Student(self._network, self._views.device)
        schedule = Recipe(epochs=1, learning_rate=rate, warmup_epochs=WARMUP)
        losses: list[float] = []
        ends = {math.ceil(n_steps * (i + 1) / N_ROWS) for i in range(N_ROWS)}
        fails = False
        for step in range(1, n_steps + 1):
            # The middle of the step: at its ends the rate would be 0 in the first or in the last one.
            now = learning_rate(schedule, (step - 0.5) / n_steps)
            losses.append(student.step(*self._views[step - 1], now))
            self._tell(stage, rate, losses[-1])
            fails = not math.isfinite(losses[-1])
            if step in ends or fails:
                row = stage, rate, step, n_steps, now, sum(losses) / len(losses), None
                self.history.append(dict(zip(DISTILLING_COLUMNS, row, strict=True)))
                losses = []
            if fails:
                self.done += n_steps - step
                break
        network = student.finished()
        found = 1.0 if fails else self._judge(network)
        self.history[-1]["divergence"] = found
        return network, found

    def _tell(self, stage: str, rate: float, loss: float) -> None:
        self.done += 1
        left = (time.monotonic() - self._started) / self.done * (self._n_steps - self.done)
        name = f"{stage} at rate {rate:g}" if stage == "trial" else f"rate {rate:g}"
        self._lines("step %d of %d (%s), loss %.4f, about %.0f s left", self.done, self._n_steps, name, loss, left)
        if self._progress:
            self._progress(self.done, self._n_steps)


class _Clock:
    """How long steps take, found by running a few of them on a copy.

    Args:
        network: The network.
        views: Batches.
        n_rates: Rates to try.
        measuring: Seconds that one look at the search images takes.
    """

    def __init__(self, network: nn.Module, views: _Views, n_rates: int, measuring: float) -> None:
        student = _Student(network, views.device)
        answering, stepping = [], []
        for step in range(1 + N_TIMED):
            x, _ = views[step]
            begun = time.monotonic()
            float(views.answers(x).sum())
            answered = time.monotonic()
            # The batch is made anew, as for every step, but answered to already.
            student.step(*views[step], 1e-6)
            answering.append(answered - begun)
            stepping.append(time.monotonic() - answered)
        self._answering, self._stepping = median(answering[1:]), median(stepping[1:])
        self._n_rates, self._measuring = n_rates, measuring
        self._n_answers = N_VIEWS * views.n_batches

    def seconds(self, n_steps: int) -> float:
        """How long that many steps take, trials included."""
        n_final = n_steps - (self._n_rates if self._n_rates > 1 else 0) * trial_steps(n_steps, self._n_rates)
        n_looks = 1 + (self._n_rates if self._n_rates > 1 else 0)
        return n_steps * self._stepping + min(n_final, self._n_answers) * self._answering + n_looks * self._measuring

    def steps_within(self, left: float, budget: float) -> int:
        """The most steps that fit into the seconds that are left of a budget.

        Raises:
            ValueError: Too few do.
        """
        least = _least_steps(self._n_rates)
        if self.seconds(least) > left:
            raise ValueError(
                f"expected a budget of at least {math.ceil(budget - left + self.seconds(least))} seconds for {least} "
                f"steps, found {budget:g}; give more seconds"
            )
        n = least
        while self.seconds(2 * n) <= left:
            n *= 2
        low, high = n, 2 * n
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.seconds(middle) <= left else (low, middle)
        return low
