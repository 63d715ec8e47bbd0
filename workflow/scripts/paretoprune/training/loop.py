"""One training loop: for dense networks from scratch, and for pruned ones with their mask held fixed."""

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from paretoprune.copies import copied
from paretoprune.data.datasets import check_augmentation
from paretoprune.data.splits import LabelledImages
from paretoprune.files import atomic_path
from paretoprune.networks.architectures import to_channels_last
from paretoprune.networks.wrapping import logits_of

TRAINING_COLUMNS = ("epoch", "learning_rate", "loss", "train_error")


class TrainingDivergedError(ArithmeticError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images per step.
        learning_rate: Peak of the schedule.
        momentum: Of SGD with Nesterov momentum.
        weight_decay: L2 penalty on weights, not on biases and normalisation parameters.
        warmup_epochs: Epochs of linear increase before the cosine decay; may be fractional.
        label_smoothing: Share of the target spread over all classes, 0 to 1.
        crop: Pixels of zero padding from which a random crop of the image's size is taken; 0 for none.
        flip: Whether images are mirrored left to right half of the time.
        distillation: Weight of the teacher's answers in the loss, 0 to 1; the rest is the labels'.
        temperature: Softens the answers of teacher and student alike.
    """

    epochs: int
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.0
    crop: int = 0
    flip: bool = False
    distillation: float = 0.0
    temperature: float = 2.0


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """Linear warm-up, then half a cosine down to 0.

    Args:
        recipe: Peak and lengths.
        epoch: Epochs done, fractional, 0 to `recipe.epochs`.
    """
    warmup = min(recipe.warmup_epochs, recipe.epochs / 2)
    if epoch < warmup:
        return recipe.learning_rate * epoch / warmup
    progress = (epoch - warmup) / max(recipe.epochs - warmup, 1e-9)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def augment(images: Tensor, crop: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift by up to `crop` pixels over zero padding, and mirror half of the images.

    Args:
        images: float (n, channels, height, width), normalised, so that 0 is the mean colour.
        crop: Largest shift in pixels.
        flip: Whether to mirror.
        generator: Draws shifts and mirrors, on the CPU.

    Returns:
        Same shape.
    """
    if not crop and not flip:
        return images  # signals and tables too
    n, channels, height, width = images.shape
    if crop:
        padded = functional.pad(images, (crop,) * 4)
        top, left = torch.randint(0, 2 * crop + 1, (2, n, 1), generator=generator)
        rows = (top + torch.arange(height)).to(images.device)[:, None, :, None]
        columns = (left + torch.arange(width)).to(images.device)[:, None, None, :]
        index = torch.arange(n, device=images.device)[:, None, None, None]
        images = padded[index, torch.arange(channels, device=images.device)[None, :, None, None], rows, columns]
    if flip:
        mirrored = (torch.rand(n, generator=generator) < 0.5).to(images.device)
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images


def _parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    parameters = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def train(
    network: nn.Module,
    data: LabelledImages,
    recipe: Recipe,
    *,
    seed: int,
    masks: Mapping[str, Tensor] | None = None,
    teacher: nn.Module | None = None,
    resume: Path | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Train a copy of a network by SGD with Nesterov momentum.

    On a GPU, forward passes run in bfloat16. The order of the images and their augmentation depend on the seed and the
    epoch only, so a resumed training equals an uninterrupted one.

    Args:
        network: Start; it is left as it is.
        data: Training images; where they lie is where the network is trained.
        recipe: How to train.
        seed: Fixes order and augmentation.
        masks: Parameter name to bool tensor of its shape: weights that are False are 0 and stay 0.
        teacher: Network to distil from, needed where `recipe.distillation` is above 0.
        resume: File that keeps the state after every epoch; read first when it is there, removed at the end.
        progress: Called with each new row of the history.

    Returns:
        The trained network in evaluation mode on the CPU, and one row an epoch with the keys `TRAINING_COLUMNS`.

    Raises:
        TrainingDivergedError: The loss is no longer finite; the saved state is removed, for it is of no use.
        ValueError: Distillation without a teacher, or no images.
    """
    if recipe.distillation > 0 and teacher is None:
        raise ValueError("a recipe with distillation needs a teacher, found none; give one or set distillation to 0")
    if len(data) < 2 or recipe.batch_size < 2:
        raise ValueError(
            f"expected at least two training images and a batch_size of at least 2, which batch norm needs, found "
            f"{len(data)} images and batch_size {recipe.batch_size}"
        )
    check_augmentation(data.images, recipe.crop, recipe.flip)
    trainer = _Trainer(network, data, recipe, seed, masks or {}, teacher)
    origin = _origin(trainer.network, data, recipe, seed) if resume else ""
    history = _resume(resume, trainer.network, trainer.optimiser, origin) if resume else []
    trainer.apply_masks()
    for epoch in range(len(history), recipe.epochs):
        # Dropout draws from the global generators, which are put back afterwards.
        with torch.random.fork_rng(devices=[data.images.device] if trainer.mixed else []):
            try:
                row = trainer.train_epoch(epoch)
            except TrainingDivergedError:
                if resume:
                    resume.unlink(missing_ok=True)
                raise
        history.append(row)
        if resume:
            _save_state(resume, trainer.network, trainer.optimiser, origin, history)
        if progress:
            progress(row)
    if resume:
        resume.unlink(missing_ok=True)
    finished = trainer.network.to("cpu").to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    finished.eval()
    return finished, history


class _Trainer:
    """A copy of a network in training, see `train`.

    Attributes:
        network: The copy.
        optimiser: Holds its momenta.
        mixed: Whether forward passes run in bfloat16.
    """

    def __init__(
        self,
        network: nn.Module,
        data: LabelledImages,
        recipe: Recipe,
        seed: int,
        masks: Mapping[str, Tensor],
        teacher: nn.Module | None,
    ) -> None:
        self._data, self._recipe, self._seed = data, recipe, seed
        device = data.images.device
        self.mixed = device.type == "cuda"
        self.network = to_channels_last(copied(network).to(device))
        self.network.train()
        self._teacher = teacher
        if teacher is not None:
            self._teacher = to_channels_last(copied(teacher).to(device).requires_grad_(False))
            self._teacher.eval()
        parameters = dict(self.network.named_parameters())
        self._kept = {parameters[name]: mask.to(device) for name, mask in masks.items()}
        groups = _parameter_groups(self.network, recipe.weight_decay)
        self.optimiser = torch.optim.SGD(groups, lr=0.0, momentum=recipe.momentum, nesterov=recipe.momentum > 0)

    def apply_masks(self) -> None:
        """Put what the masks drop to 0."""
        with torch.no_grad():
            for parameter, mask in self._kept.items():
                parameter.masked_fill_(~mask, 0.0)

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """One pass over the images in an order that depends on seed and epoch only; a row of the history."""
        recipe, images, labels = self._recipe, self._data.images, self._data.labels
        epoch_seed = self._seed * 1_000_003 + epoch
        generator = torch.Generator().manual_seed(epoch_seed)
        torch.default_generator.manual_seed(epoch_seed)
        if self.mixed:
            torch.cuda.manual_seed(epoch_seed)
        order = torch.randperm(len(images), generator=generator)
        batches = [batch for batch in order.split(recipe.batch_size) if len(batch) > 1]  # batch norm needs two
        total_loss, n_wrong, n_seen, rate = 0.0, 0, 0, 0.0
        for step, batch in enumerate(batches):
            # The middle of the step: at its ends the rate would be 0 in the first or in the last one.
            rate = learning_rate(recipe, epoch + (step + 0.5) / len(batches))
            indices = batch.to(images.device)
            x = augment(images[indices], recipe.crop, recipe.flip, generator)
            # Not `channels_last`: the strides of single channels would choose other kernels, and end in other weights.
            x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.contiguous()
            loss, wrong = self._step(x, labels[indices], rate)
            total_loss += loss * len(batch)
            if not math.isfinite(total_loss):
                raise TrainingDivergedError(
                    f"the loss became {loss} in epoch {epoch + 1} of {recipe.epochs}, step {step + 1}; "
                    f"lower the learning_rate (now {recipe.learning_rate}), lengthen the warm-up, or check the images"
                )
            n_wrong += wrong
            n_seen += len(batch)
        return {
            "epoch": epoch + 1,
            "learning_rate": rate,
            "loss": total_loss / n_seen,
            "train_error": n_wrong / n_seen,
        }

    def _step(self, x: Tensor, y: Tensor, rate: float) -> tuple[float, int]:
        """One step of the optimiser, unless the loss is not finite; the loss, and the number of wrong answers."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with torch.autocast("cuda", torch.bfloat16, enabled=self.mixed):
            logits = logits_of(self.network(x))
            loss = _loss(logits.float(), y, x, self._recipe, self._teacher)
        if math.isfinite(float(loss.detach())):
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            self.apply_masks()
        return float(loss.detach()), int((logits.argmax(dim=1) != y).sum())


def _loss(logits: Tensor, labels: Tensor, images: Tensor, recipe: Recipe, teacher: nn.Module | None) -> Tensor:
    """Cross-entropy, mixed with the divergence from the teacher's softened answers.

    Source:
        Hinton et al., "Distilling the knowledge in a neural network", 2015: gradients of softened answers shrink with
        the square of the temperature, hence the factor.
    """
    loss = functional.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    if teacher is None or recipe.distillation == 0:
        return loss
    with torch.no_grad():
        target = functional.log_softmax(teacher(images).float() / recipe.temperature, dim=1)
    answer = functional.log_softmax(logits / recipe.temperature, dim=1)
    apart = functional.kl_div(answer, target, reduction="batchmean", log_target=True) * recipe.temperature**2
    return (1 - recipe.distillation) * loss + recipe.distillation * apart


def _origin(network: nn.Module, data: LabelledImages, recipe: Recipe, seed: int) -> str:
    """A digest of everything that a training starts from: only an equal one may be resumed.

    Without it, a training interrupted before the splits changed would go on from weights that have seen test images.
    """
    digest = hashlib.blake2b(repr((asdict(recipe), seed)).encode(), digest_size=16)
    for name, tensor in [*network.state_dict().items(), ("images", data.images), ("labels", data.labels)]:
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _save_state(
    path: Path, network: nn.Module, optimiser: torch.optim.Optimizer, origin: str, history: list[Any]
) -> None:
    state = {
        "network": network.state_dict(),
        "optimiser": optimiser.state_dict(),
        "origin": origin,
        "history": history,
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def _resume(path: Path, network: nn.Module, optimiser: torch.optim.Optimizer, origin: str) -> list[dict[str, Any]]:
    """Fill network and optimiser from a saved state; an empty history where there is none that fits."""
    if not path.is_file():
        return []
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state.get("origin") != origin:
        warnings.warn(
            f"'{path}' belongs to another recipe, seed, network or other images; training starts afresh", stacklevel=3
        )
        return []
    network.load_state_dict(state["network"])
    optimiser.load_state_dict(state["optimiser"])
    return list(state["history"])


def check_mask(network: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Verify, weight by weight, that everything outside the masks is exactly 0.

    Args:
        network: A pruned network.
        masks: Parameter name to bool tensor of its shape, True = kept.

    Raises:
        RuntimeError: Some weight that should be gone is not; its tensor is named.
    """
    parameters = dict(network.named_parameters())
    for name, mask in masks.items():
        n_alive = int(torch.count_nonzero(parameters[name].detach().cpu()[~mask.cpu()]))
        if n_alive:
            raise RuntimeError(
                f"expected {int((~mask).sum())} pruned weights in '{name}' to be 0, found {n_alive} that are not"
            )
