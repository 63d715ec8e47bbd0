"""Layer statistics: the second moments of what every prunable layer is given, and how much its outputs matter.

Importance by curvature and the closed-form re-fit of weights both follow from them. They are gathered in one pass of
the dense network over calibration images; labels are not needed.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from paretoprune.copies import copied
from paretoprune.devices import out_of_memory
from paretoprune.masks.units import WeightUnits
from paretoprune.tensors import load_tensors, save_tensors

# Output positions of one image that a layer's moments are taken over: neighbouring ones say nearly the same, and more
# images say more than more positions.
POSITIONS = 64
# Columns of a block in products of columns: small enough for a processor's cache.
GRAM_BLOCK = 192
# Images that the sensitivity of outputs is taken over, at most: it needs a backward pass.
N_SENSITIVITY_IMAGES = 256
BATCH_SIZE = 64
_TRANSPOSED = nn.modules.conv._ConvTransposeNd
_LOGGER = logging.getLogger("paretoprune")


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration images say about one prunable layer.

    A layer of `groups` groups maps columns (inputs of one output position: channels of its group times kernel) to rows
    (outputs of its group); for a linear layer and most convolutions there is one group.

    Attributes:
        covariance: float32 (groups, n_columns, n_columns), of the columns about their mean.
        mean: float32 (groups, n_columns), of the columns.
        sensitivity: float32 (n_rows,), over all groups: mean over images of the squared derivative of a random
            projection of the logits by the output, summed over positions. A squared error of an output, times this, is
            to first order the squared error of the logits that follows.
        n_samples: Columns that were seen: images times positions.
        shifts_freely: Whether an output may be off by a constant: a batch norm follows, which is corrected, or the
            layer has a bias to take it. Then only the covariance matters, otherwise the raw second moment.
    """

    covariance: Tensor
    mean: Tensor
    sensitivity: Tensor
    n_samples: int
    shifts_freely: bool

    @property
    def curvature(self) -> Tensor:
        """Half the second derivative of a row's squared error by its weights, float32 (groups, n_columns, n_columns).

        The covariance, or the raw second moment where a constant error is an error.
        """
        if self.shifts_freely:
            return self.covariance
        return self.covariance + self.mean[:, :, None] * self.mean[:, None, :]

    @property
    def n_dead(self) -> int:
        """Number of columns that never vary (and, where that matters, are 0): weights on them do nothing."""
        return int((self.curvature.diagonal(dim1=1, dim2=2) <= 0).sum())


def im2col(module: nn.Module, inputs: Tensor, positions: Tensor | None = None) -> Tensor:
    """The inputs of a layer, unfolded: what each output position sees.

    Args:
        module: A convolution (not transposed) or a linear layer.
        inputs: What it is given, (n, channels, ...) or (..., channels).
        positions: Which output positions to take, int64 flat indices (n_positions,); None for all.

    Returns:
        (groups, n * n_positions, n_columns), in the order of the weights of a row.
    """
    if isinstance(module, nn.Linear):
        rows = inputs.reshape(-1, inputs.shape[-1])
        return rows[None]
    assert isinstance(module, nn.modules.conv._ConvNd)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if any(module._reversed_padding_repeated_twice):
        inputs = functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    n_spatial = len(module.kernel_size)
    windows = inputs
    for i in range(n_spatial):
        reach = module.dilation[i] * (module.kernel_size[i] - 1) + 1
        windows = windows.unfold(2 + i, reach, module.stride[i])
    apart: Any = (..., *(slice(None, None, step) for step in module.dilation))
    windows = windows[apart]
    out_shape = windows.shape[2 : 2 + n_spatial]
    if positions is None:
        positions = torch.arange(prod(out_shape), device=inputs.device)
    at: list[Any] = []
    rest = positions
    for size in reversed(out_shape):
        at.insert(0, rest % size)
        rest = rest // size
    windows = windows.permute(0, *range(2, 2 + n_spatial), 1, *range(2 + n_spatial, 2 + 2 * n_spatial))
    taken = windows[(slice(None), *at)]  # (n, n_positions, channels, *kernel), as it is needed
    return taken.reshape(len(taken) * len(positions), module.groups, -1).transpose(0, 1)


def output_matrix(module: nn.Module, outputs: Tensor, positions: Tensor | None = None) -> Tensor:
    """The outputs of a layer beside its `im2col`: (groups, n * n_positions, n_rows of a group)."""
    if isinstance(module, nn.Linear):
        return outputs.reshape(-1, outputs.shape[-1])[None]
    assert isinstance(module, nn.modules.conv._ConvNd)
    flat = outputs.flatten(2)
    flat = flat if positions is None else flat[:, :, positions]
    n, channels, n_positions = flat.shape
    grouped = flat.reshape(n, module.groups, channels // module.groups, n_positions)
    return grouped.permute(1, 0, 3, 2).reshape(module.groups, n * n_positions, -1)


def weight_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight as (groups, n_rows of a group, n_columns)."""
    groups = 1 if isinstance(module, nn.Linear) else int(module.groups)  # type: ignore[arg-type]
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def some_positions(module: nn.Module, outputs: Tensor, n: int | None, generator: torch.Generator) -> Tensor | None:
    """Output positions to look at, sorted, drawn without replacement; None where all are."""
    n_all = 1 if isinstance(module, nn.Linear) else prod(outputs.shape[2:])
    if n is None or n_all <= n:
        return None
    return torch.randperm(n_all, generator=generator)[:n].sort().values.to(outputs.device)


def gram(x: Tensor) -> Tensor:
    """Products of all columns with each other.

    Args:
        x: float (groups, n, n_columns).

    Returns:
        (groups, n_columns, n_columns). On a CPU only one half is computed, in blocks, and mirrored: twice as fast for
        576 columns.
    """
    n_columns = x.shape[-1]
    if x.is_cuda or n_columns <= GRAM_BLOCK:
        return x.mT @ x
    products = x.new_empty((len(x), n_columns, n_columns))
    for start in range(0, n_columns, GRAM_BLOCK):
        stop = start + GRAM_BLOCK
        rows = x[..., start:stop].mT @ x[..., :stop]
        products[:, start:stop, :stop] = rows
        products[:, :start, start:stop] = rows[..., :start].mT
    return products


class Moments:
    """Sums of columns and of their products with each other and with targets, added up batch by batch.

    A batch is summed in float32, the batches in float64, so that a long pass loses no digits. Columns are taken from
    the first batch's mean, or those that hardly vary would be lost in the rounding of their squares.
    """

    def __init__(self) -> None:
        self.n = 0
        self._origin: Tensor | None = None
        self._x: Any = 0.0
        self._y: Any = 0.0
        self._xx: Any = 0.0
        self._yx: Any = 0.0

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add columns (groups, n, n_columns) and, beside them, targets (groups, n, n_rows)."""
        self.n += x.shape[1]
        if self._origin is None:
            self._origin = x.mean(dim=1, keepdim=True, dtype=torch.float64).to(x.dtype)
        x = x - self._origin
        self._x = self._x + x.sum(dim=1, dtype=torch.float64)
        self._xx = self._xx + gram(x).double()
        if y is not None:
            self._y = self._y + y.sum(dim=1, dtype=torch.float64)
            self._yx = self._yx + (y.mT @ x).double()

    @property
    def mean(self) -> Tensor:
        """Of the columns, float64 (groups, n_columns)."""
        assert self._origin is not None
        return self._origin[:, 0].double() + self._offset

    @property
    def _offset(self) -> Tensor:
        """Mean of the columns from where they are taken."""
        offset: Tensor = self._x / self.n
        return offset

    @property
    def target_mean(self) -> Tensor:
        """Of the targets, float64 (groups, n_rows)."""
        mean: Tensor = self._y / self.n
        return mean

    def second(self, *, about_mean: bool) -> Tensor:
        """Second moment of the columns, float64 (groups, n_columns, n_columns)."""
        moment: Tensor = self._xx / self.n - self._offset[:, :, None] * self._offset[:, None, :]
        return moment if about_mean else moment + self.mean[:, :, None] * self.mean[:, None, :]

    def cross(self, *, about_mean: bool) -> Tensor:
        """Mean product of targets and columns, float64 (groups, n_rows, n_columns)."""
        moment: Tensor = self._yx / self.n - self.target_mean[:, :, None] * self._offset[:, None, :]
        return moment if about_mean else moment + self.target_mean[:, :, None] * self.mean[:, None, :]


def prunable_modules(network: nn.Module, layout: WeightUnits) -> dict[str, list[tuple[str, nn.Module]]]:
    """The modules that hold each prunable tensor, by the tensor's name, as (module name, module).

    Transposed convolutions are left out: their weights lie the other way round, and no row stands for one output.
    """
    parameters = dict(network.named_parameters())
    named = {id(parameters[name]): name for name in layout.names}
    found: dict[str, list[tuple[str, nn.Module]]] = {name: [] for name in layout.names}
    for module_name, module in network.named_modules():
        weight = getattr(module, "weight", None)
        kind = isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and not isinstance(module, _TRANSPOSED)
        if kind and id(weight) in named:
            found[named[id(weight)]].append((module_name, module))
    return {name: modules for name, modules in found.items() if modules}


def collect_statistics(
    network: nn.Module,
    layout: WeightUnits,
    images: Tensor,
    *,
    seed: int,
    positions: int | None = POSITIONS,
    device: str | torch.device = "cpu",
) -> dict[str, LayerStatistics]:
    """Gather the statistics of all prunable layers in one pass over calibration images, batch by batch.

    Args:
        network: The dense network; it is copied and left as it is.
        layout: Its prunable tensors.
        images: Calibration images (n, channels, height, width), normalised, in random order: how much outputs matter is
            taken from the first `N_SENSITIVITY_IMAGES`.
        seed: Fixes the positions and the projections of the logits that are drawn.
        positions: Output positions of each image, at most; None for all.
        device: Where to compute.

    Returns:
        By tensor name. A tensor of transposed convolutions, or one that the network does not run, has none.

    Raises:
        ValueError: There are no images, the network cannot be differentiated, or the inputs of a layer are not finite;
            the message names it.

    Source:
        Second moments of inputs as curvature: Hassibi and Stork, "Second order derivatives for network pruning: Optimal
        brain surgeon", 1993, layer by layer as in Dong et al., "Learning to prune deep neural networks via layer-wise
        optimal brain surgeon", 2017. Taken about the mean where a batch norm or a bias follows: our own.
    """
    if not len(images):
        raise ValueError("layer statistics need calibration images, found none; raise `calibration` of the dataset")
    network = copied(network).to(device).float()
    network.eval()
    # Where a gradient could flow through is all that counts below.
    network.requires_grad_(False)
    observer = _Observer(prunable_modules(network, layout), positions, torch.Generator().manual_seed(seed))
    n_sensitive = 0
    with observer.watching(network):
        for batch in images.split(BATCH_SIZE):
            batch = batch.detach().to(device).float()
            if n_sensitive < N_SENSITIVITY_IMAGES:
                observer.see_with_gradients(network, batch)
                n_sensitive += len(batch)
            else:
                with torch.inference_mode():
                    network(batch)
    found = {}
    for name, held in observer.modules.items():
        moments = observer.moments[name]
        if not moments.n:
            continue
        n_rows = layout.shapes[layout.names.index(name)][0]
        square = observer.squares.get(name, torch.zeros(n_rows, dtype=torch.float64))
        found[name] = LayerStatistics(
            moments.second(about_mean=True).float().cpu(),
            moments.mean.float().cpu(),
            (square / max(1, n_sensitive)).float().cpu(),
            moments.n,
            observer.normalised.get(name, False) or all(module.bias is not None for _, module in held),
        )
    check_statistics(found)
    return found


# A tensor, and its version when it was seen: what has been changed in place meanwhile is something else.
_Seen = tuple[Tensor, int]


class _Observer:
    """Watches the prunable layers of a network while images run through it.

    Args:
        modules: The layers, see `prunable_modules`.
        positions: Output positions of one image to look at; None for all.
        generator: Draws them, and the projections of the logits.

    Attributes:
        moments: Of each layer's columns.
        squares: Of each layer that a derivative has reached: sums of squared derivatives by its outputs, float64
            (n_rows,).
        normalised: Of each layer, whether all that it makes is given to batch norms, and to nothing else.
    """

    def __init__(
        self,
        modules: Mapping[str, list[tuple[str, nn.Module]]],
        positions: int | None,
        generator: torch.Generator,
    ) -> None:
        self.modules = modules
        self.moments = {name: Moments() for name in modules}
        self.squares: dict[str, Tensor] = {}
        self.normalised: dict[str, bool] = {}
        self._positions, self._generator = positions, generator
        # Outputs of a batch by layer, and what its batch norms are given.
        self._made: dict[str, list[_Seen]] = {}
        self._given: list[_Seen] = []

    @contextmanager
    def watching(self, network: nn.Module) -> Iterator[None]:
        """Hooks on the layers and on the batch norms of a network, as long as the context lasts."""
        handles = [
            module.register_forward_hook(
                lambda module, inputs, output, name=name: self._observe(name, module, inputs[0], output)
            )
            for name, held in self.modules.items()
            for _, module in held
        ]
        handles += [
            module.register_forward_pre_hook(lambda module, inputs: self._note(inputs[0]))
            for module in network.modules()
            if isinstance(module, _BatchNorm)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _observe(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        at = some_positions(module, output, self._positions, self._generator)
        self.moments[name].add(im2col(module, x.detach(), at))
        # In inference mode only moments are taken, and tensors have no versions.
        if torch.is_inference_mode_enabled():
            return
        self._made.setdefault(name, []).append((output, output._version))
        if output.requires_grad:
            # Unlike the gradient that a tensor retains, it is that of the output before a ReLU in place.
            output.register_hook(lambda gradient: self._weigh(name, module, gradient))

    def _note(self, x: Tensor) -> None:
        if not torch.is_inference_mode_enabled():
            self._given.append((x, x._version))

    def _weigh(self, name: str, module: nn.Module, gradient: Tensor) -> None:
        self.squares[name] = self.squares.get(name, 0.0) + _per_row(module, gradient)

    def see_with_gradients(self, network: nn.Module, batch: Tensor) -> None:
        """Run images (n, c, h, w) forward and a random projection of their logits backward.

        Raises:
            ValueError: The network has no derivatives.
        """
        self._made.clear()
        self._given.clear()
        with derivatives_needed():
            logits = network(batch.requires_grad_(True))
            signs = torch.randint(0, 2, logits.shape, generator=self._generator).to(logits) * 2 - 1
            # A constant added to all logits changes no answer.
            projection = ((signs - signs.mean(dim=1, keepdim=True)) * logits).sum()
            projection.backward()
        normed = {(id(x), version) for x, version in self._given}
        self.normalised = {
            name: all((id(x), version) in normed for x, version in outputs) for name, outputs in self._made.items()
        }


@contextmanager
def derivatives_needed() -> Iterator[None]:
    """Say what to do where a network cannot be differentiated.

    Raises:
        ValueError: It has no derivatives.
    """
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise ValueError(
            f"the network has no derivatives ({str(error).splitlines()[0]}); let its forward compute with torch alone, "
            "without numpy, detach, no_grad and inference_mode, and change nothing in place that a derivative needs, "
            "or use a repair and importance scores without statistics and gradients"
        ) from error


def _per_row(module: nn.Module, gradient: Tensor) -> Tensor:
    """Sum of squares per output of a layer, float64 (n_rows,)."""
    if isinstance(module, nn.Linear):
        return gradient.reshape(-1, gradient.shape[-1]).double().square().sum(dim=0)
    return gradient.flatten(2).double().square().sum(dim=(0, 2))


def check_statistics(statistics: Mapping[str, LayerStatistics]) -> None:
    """Refuse statistics that are not finite, and warn of layers that the calibration images do not determine.

    Raises:
        ValueError: A layer has statistics that are not finite.
    """
    for name, layer in statistics.items():
        for part in (layer.covariance, layer.mean, layer.sensitivity):
            if not bool(torch.isfinite(part).all()):
                raise ValueError(
                    f"the statistics of '{name}' are not finite: its inputs on the calibration images or the "
                    "derivatives of its outputs overflow; check the checkpoint, its input normalisation and the images"
                )
        n_columns = layer.mean.shape[1]
        if layer.n_samples <= n_columns:
            _LOGGER.warning(
                "'%s' has %d inputs, but the calibration images give only %d samples of them: what they leave open is "
                "held near the trained weights (`reconstruction.damping`); raise `calibration` of the dataset",
                name,
                n_columns,
                layer.n_samples,
            )
        if layer.n_dead:
            _LOGGER.info("%d of %d inputs of '%s' are dead: always the same", layer.n_dead, layer.mean.numel(), name)


def save_statistics(path: str | os.PathLike[str], statistics: Mapping[str, LayerStatistics]) -> None:
    """Write statistics to a safetensors file, each under `<tensor name>/<attribute>`."""
    tensors: dict[str, Tensor] = {}
    for name, layer in statistics.items():
        tensors[f"{name}/covariance"] = layer.covariance
        tensors[f"{name}/mean"] = layer.mean
        tensors[f"{name}/sensitivity"] = layer.sensitivity
        tensors[f"{name}/facts"] = torch.tensor([layer.n_samples, layer.shifts_freely])
    save_tensors(path, tensors)


def load_statistics(path: str | os.PathLike[str]) -> dict[str, LayerStatistics]:
    """Read what `save_statistics` wrote."""
    tensors = load_tensors(path)
    names = [key.removesuffix("/facts") for key in tensors if key.endswith("/facts")]
    found = {}
    for name in names:
        n_samples, shifts_freely = tensors[f"{name}/facts"].tolist()
        covariance, mean, sensitivity = (tensors[f"{name}/{part}"] for part in ("covariance", "mean", "sensitivity"))
        found[name] = LayerStatistics(covariance, mean, sensitivity, n_samples, bool(shifts_freely))
    return found


def read_statistics(inputs: Mapping[str, Any]) -> dict[str, LayerStatistics] | None:
    """The layer statistics among a step's input files; None where its repairs need none."""
    # Snakemake gives one file as it is, or a list of it, or an empty list.
    found = inputs.get("statistics") or []
    files = [found] if isinstance(found, str) else list(found)
    return load_statistics(files[0]) if files else None
