"""Refit: the kept weights of every layer anew in closed form, so that its outputs stay what they were.

A row keeps some of its weights. Those that bring its outputs nearest to the dense network's solve the linear system of
the kept block of H, the second moments of its inputs (`importance.layer_statistics`): least squares, no gradient step.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from paretoprune.devices import repeatable
from paretoprune.importance.curvature import DAMPING, damped
from paretoprune.importance.layer_statistics import LayerStatistics, prunable_modules
from paretoprune.masks.units import WeightUnits

# Memory (MB) for re-fitted layers that other candidates share.
CACHE_MB = 256
# Kept weights of a row up to which what growing others gains is worked out exactly.
EXACT_WIDTH = 96
# Entries of the kept blocks that are gathered and factored at a time: 64 MB in float32.
BLOCK_ENTRIES = 16 * 2**20


def refit(
    weight: Tensor,
    kept: Tensor,
    curvature: Tensor,
    target: Tensor | None = None,
    inverse: Tensor | None = None,
    *,
    block_entries: int = BLOCK_ENTRIES,
) -> Tensor:
    """The weights of each row that minimise its squared error over the kept positions, the others being 0.

    Rows with about as many kept weights are solved together: the kept block of the curvature is gathered for each,
    filled up with the identity where a row keeps fewer, and factored (Cholesky). A row that loses fewer weights than it
    keeps is solved from the other side: w - H⁻¹[:, lost] (H⁻¹[lost, lost])⁻¹ w[lost], the same least squares.

    Args:
        weight: (groups, n_rows, n_columns), the trained weights w.
        kept: bool, the same shape.
        curvature: H, (groups, n_columns, n_columns), positive definite: damped, see `importance.curvature.damped`.
        target: What the normal equations aim at, (groups, n_rows, n_columns): H w where the outputs of the trained
            weights on the same inputs are the aim (None), otherwise mean products of outputs and inputs.
        inverse: H⁻¹, if known: where `target` is None, rows that lose few weights are solved faster with it.
        block_entries: Entries of the kept blocks that are held in memory at a time.

    Returns:
        The shape of `weight` in the type of `curvature`, 0 where nothing is kept.
    """
    weight = weight.to(curvature.dtype)
    found = torch.zeros_like(weight)
    aim = weight @ curvature if target is None else target.to(curvature.dtype)
    for group in range(len(weight)):
        n_kept = kept[group].sum(dim=1)
        from_lost = torch.zeros_like(n_kept, dtype=torch.bool)
        if inverse is not None and target is None:
            from_lost = n_kept * 2 > kept.shape[2]
            for some, width in _similar_rows(kept.shape[2] - n_kept, from_lost, block_entries):
                lost = ~kept[group, some]
                pulled = _solve_rows(lost, inverse[group], weight[group, some], width)
                found[group, some] = (weight[group, some] - pulled @ inverse[group]).masked_fill_(lost, 0.0)
        for some, width in _similar_rows(n_kept, ~from_lost, block_entries):
            found[group, some] = _solve_rows(kept[group, some], curvature[group], aim[group, some], width)
    return found


def _similar_rows(sizes: Tensor, wanted: Tensor, block_entries: int) -> Iterator[tuple[Tensor, int]]:
    """Rows with systems of similar size, to be solved together, as their indices and the largest size.

    Args:
        sizes: int (n_rows,), of each row's system.
        wanted: bool (n_rows,).
        block_entries: Entries of their systems, at most, unless one row has more.
    """
    order = sizes.argsort(stable=True)
    order = order[wanted[order]]
    while len(order):
        # From the largest down: neighbours in this order need the least filling up.
        width = int(sizes[order[-1]])
        fitting = order[-max(1, block_entries // max(1, width * width)) :]
        n = int((sizes[fitting] * 4 >= width * 3).sum())
        yield order[-n:], width
        order = order[:-n]


def _factored_blocks(within: Tensor, matrix: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gather and factor each row's own block of one matrix.

    Args:
        within: bool (n, n_columns), which columns are in a row's block, at most `width`.
        matrix: (n_columns, n_columns), positive definite.
        width: Size of the largest block.

    Returns:
        The columns of each block, int64 (n, width), filled up with others; which ones those are, bool (n, width); and
        the lower Cholesky factors (n, width, width), in which they stand for themselves alone.
    """
    at = within.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    filling = torch.arange(width, device=within.device)[None] >= within.sum(dim=1)[:, None]
    block = matrix[at[:, :, None], at[:, None, :]]
    block.masked_fill_(filling[:, :, None] | filling[:, None, :], 0.0)
    block.diagonal(dim1=1, dim2=2).masked_fill_(filling, 1.0)
    return at, filling, torch.linalg.cholesky(block)


def _solve_rows(within: Tensor, matrix: Tensor, aim: Tensor, width: int) -> Tensor:
    """Solve the system of each row's own block of one matrix.

    Args:
        within: bool (n, n_columns), which columns are in a row's block, at most `width`.
        matrix: (n_columns, n_columns), positive definite.
        aim: (n, n_columns), right-hand sides.
        width: Size of the largest block.

    Returns:
        (n, n_columns), 0 outside of each block.
    """
    if not width:
        return torch.zeros_like(aim)
    at, filling, factor = _factored_blocks(within, matrix, width)
    right = aim.gather(1, at).masked_fill_(filling, 0.0)
    solved = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]
    return torch.zeros_like(aim).scatter_(1, at, solved.masked_fill_(filling, 0.0))


def refitted_costs(
    kept: Tensor,
    weight: Tensor,
    refitted: Tensor,
    curvature: Tensor,
    inverse: Tensor | None = None,
    *,
    exact_width: int = EXACT_WIDTH,
    block_entries: int = BLOCK_ENTRIES,
) -> Tensor:
    """What changing a weight's place does to the error of its row, all kept weights being re-fitted afterwards.

    Args:
        kept: bool (n_rows, n_columns).
        weight: float32, the same shape: the trained weights.
        refitted: The same shape: the kept weights at their best, 0 elsewhere.
        curvature: H, (n_columns, n_columns), damped.
        inverse: H⁻¹; where it is given and rows keep more than `exact_width` weights, gains are taken as if every other
            weight were kept (1 / [H⁻¹]_jj for the part of a column that the kept ones do not explain): an upper bound.
        exact_width: Kept weights of a row up to which gains are exact.
        block_entries: Entries of the kept blocks that are held in memory at a time.

    Returns:
        float32, the same shape: what dropping a kept weight adds to the error, and what growing another one takes away.
    """
    width = int(kept.sum(dim=1).max())
    n = max(1, block_entries // max(1, width * kept.shape[1]))
    if len(kept) > n:
        parts = zip(kept.split(n), weight.split(n), refitted.split(n), strict=True)
        return torch.cat(
            [
                refitted_costs(*part, curvature, inverse, exact_width=exact_width, block_entries=block_entries)
                for part in parts
            ]
        )
    residual = (weight - refitted) @ curvature
    diagonal = curvature.diagonal()
    if not width:
        return residual.square() / diagonal
    at, filling, factor = _factored_blocks(kept, curvature, width)
    if inverse is not None and width > exact_width:
        unexplained = (1 / inverse.diagonal()).expand_as(weight)
    else:
        beside = curvature[at].masked_fill_(filling[:, :, None], 0.0)
        # Of the variance of a column, what the kept ones do not explain: no more than rounding where they explain all.
        explained = torch.linalg.solve_triangular(factor, beside, upper=False).square().sum(dim=1)
        unexplained = torch.maximum(diagonal - explained, 1e-6 * diagonal)
    gain = residual.square() / unexplained
    inverse = torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2)
    cost = refitted.gather(1, at).square() / inverse
    return gain.scatter(1, at, torch.where(filling, gain.gather(1, at), cost))


class Refit:
    """Re-fits every layer of one dense network, each on the dense network's own inputs.

    A layer's re-fit depends on its own mask alone: candidates that share a layer's mask share its re-fit, which is
    remembered, and the rungs of a ladder are solved once.

    Args:
        network: The dense network; nothing of it is changed.
        layout: Its prunable tensors.
        statistics: Of its layers, see `importance.layer_statistics`. Tensors without are only masked.
        damping: Share of the mean diagonal of H that is added to it.
        device: Where to compute.
        cache_mb: Memory for re-fitted layers.
        exact_width: Kept weights of a row up to which `costs` are exact, see `refitted_costs`.

    Raises:
        ValueError: The statistics are those of another network.
    """

    def __init__(
        self,
        network: nn.Module,
        layout: WeightUnits,
        statistics: Mapping[str, LayerStatistics],
        *,
        damping: float = DAMPING,
        device: str | torch.device = "cpu",
        cache_mb: float = CACHE_MB,
        exact_width: int = EXACT_WIDTH,
    ) -> None:
        self.layout, self.statistics, self.damping = layout, statistics, damping
        parameters = dict(network.named_parameters())
        self.dense = {name: parameters[name].detach().float().to(device) for name in layout.names}
        modules = prunable_modules(network, layout)
        self._curvature: dict[str, Tensor] = {}
        self._inverse: dict[str, Tensor] = {}
        self._means: dict[str, Tensor] = {}
        # Biases that take up the constant part of a layer's error, by the module that has one.
        self._biases: dict[str, tuple[str, Tensor]] = {}
        for name, layer in statistics.items():
            if name not in self.dense:
                continue
            n_columns = layer.mean.shape[1]
            if self.dense[name].numel() != layer.sensitivity.numel() * n_columns:
                raise ValueError(
                    f"the statistics of '{name}' are for {layer.sensitivity.numel()} x {n_columns} weights, found "
                    f"{self.dense[name].numel()}; compute them for this network"
                )
            self._curvature[name] = damped(layer.curvature.to(device), damping)
            self._inverse[name] = torch.linalg.inv(self._curvature[name].double()).float()
            self._means[name] = layer.mean.to(device)
            for module_name, module in modules.get(name, []):
                if layer.shifts_freely and module.bias is not None:
                    self._biases[module_name] = (name, module.bias.detach().float().to(device))  # type: ignore[operator]
        self._budget, self._exact_width = cache_mb * 2**20, exact_width
        self._held = 0
        self._known: OrderedDict[tuple[str, bytes], Tensor] = OrderedDict()
        self.n_solved = self.n_reused = 0

    def _grouped(self, name: str, tensor: Tensor) -> Tensor:
        groups = len(self._curvature[name])
        return tensor.reshape(groups, tensor.shape[0] // groups, -1)

    def layer(self, name: str, kept: Tensor) -> Tensor:
        """Re-fitted weights of one layer, float32 in its shape; not to be changed.

        Args:
            name: Of the tensor.
            kept: bool, in its shape.
        """
        dense = self.dense[name]
        if name not in self._curvature:
            return torch.where(kept, dense, 0.0)
        key = (name, kept.cpu().numpy().tobytes())
        if key in self._known:
            self._known.move_to_end(key)
            self.n_reused += 1
            return self._known[key]
        self.n_solved += 1
        if bool(kept.all()):
            solved = dense
        else:
            solved = refit(
                self._grouped(name, dense),
                self._grouped(name, kept),
                self._curvature[name],
                inverse=self._inverse[name],
            ).reshape(dense.shape)
        self._known[key] = solved
        self._held += solved.nbytes + len(key[1])
        while self._held > self._budget and len(self._known) > 1:
            (_, old), gone = self._known.popitem(last=False)
            self._held -= gone.nbytes + len(old)
        return solved

    def costs(self, name: str, kept: Tensor) -> Tensor:
        """What dropping a kept weight of a layer adds to its squared error, and growing another one takes away.

        Both after re-fitting, see `refitted_costs`; for a layer without statistics the squared weights.

        Args:
            name: Of the tensor.
            kept: bool, in its shape.

        Returns:
            float32, in its shape.
        """
        dense = self.dense[name]
        if name not in self._curvature:
            return dense.square()
        kept = kept.to(dense.device)
        parts = (self._grouped(name, tensor) for tensor in (kept, dense, self.layer(name, kept)))
        groups = zip(*parts, self._curvature[name], self._inverse[name], strict=True)
        found = [refitted_costs(*group, exact_width=self._exact_width) for group in groups]
        return torch.stack(found).reshape(dense.shape)

    def __call__(self, kept: Tensor, skip: frozenset[str] = frozenset()) -> dict[str, Tensor]:
        """Re-fit all layers under one mask.

        Args:
            kept: bool (n_weights,).
            skip: Names of tensors that are not needed.

        Returns:
            By tensor name, float32 in its shape; not to be changed.
        """
        parts = zip(self.layout.names, self.layout.shapes, kept.split(self.layout.sizes.tolist()), strict=True)
        return {name: self.layer(name, part.view(shape)) for name, shape, part in parts if name not in skip}

    def bias(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The biases with which mean outputs stay the dense network's.

        Args:
            weights: Re-fitted, from `__call__`.

        Returns:
            By module name, float32 (n_rows,), for each module that has one and whose tensor is among `weights`.
        """
        found = {}
        for module, (name, bias) in self._biases.items():
            if name in weights:
                change = self._grouped(name, self.dense[name] - weights[name])
                found[module] = bias + (change @ self._means[name][:, :, None]).reshape(-1)
        return found


class RefitCosts:
    """What dropping a kept weight of a layer costs the network and growing another one gains, both after re-fitting.

    Args:
        refit: Re-fits candidates; the sensitivities among its statistics make costs of different rows comparable.
    """

    def __init__(self, refit: Refit) -> None:
        self._refit = refit
        self._sensitivity = {name: layer.sensitivity for name, layer in refit.statistics.items()}

    def __call__(self, name: str, kept: np.ndarray) -> np.ndarray:
        """Costs and gains of the weights of a layer; by magnitude where the layer has no statistics.

        Args:
            name: Of the tensor.
            kept: bool (n_weights of the layer,).

        Returns:
            float32 (n_weights of the layer,).
        """
        with repeatable(), torch.inference_mode():
            mask = torch.from_numpy(kept.copy()).view(self._refit.dense[name].shape)
            costs = self._refit.costs(name, mask)
            if name in self._sensitivity:
                costs = costs * self._sensitivity[name].to(costs).view(-1, *[1] * (costs.ndim - 1))
            found: np.ndarray = costs.cpu().reshape(-1).numpy()
        return found
