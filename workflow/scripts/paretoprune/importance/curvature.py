"""OBS saliency and OBS order: what the loss of a weight costs when the others of its row are re-fitted afterwards.

A row of a layer (the weights of one output) has the squared error (w - v)ᵀ H (w - v) against trained weights w, with H
the second moments of its inputs (`importance.layer_statistics`). Without weight j, and with the others at their best,
it is w_j² / [H⁻¹]_jj: the saliency of the optimal brain surgeon (OBS). Times the row's sensitivity it is an error of
the logits, which can be compared over layers.
"""

import logging
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from paretoprune.importance.layer_statistics import LayerStatistics

# Share of the mean diagonal that is added to the diagonal of H.
DAMPING = 0.01
# Above so many columns the exact order of a row takes minutes; the weights are then taken in the order of their single
# losses.
MAX_COLUMNS = 1536
# Eliminated columns that are dragged along before the inverse is cut down to the rest.
_COMPACT_EVERY = 64
_LOGGER = logging.getLogger("paretoprune")


def damped(curvature: Tensor, damping: float = DAMPING) -> Tensor:
    """Curvature with a share of its mean diagonal added to its diagonal, so that it can be inverted.

    With too few samples, or dead inputs, some directions of the weights leave no trace in the outputs. The damping
    holds them at the trained weights, and keeps rounding from being magnified; 1 % costs other layers nothing.

    Args:
        curvature: (groups, n_columns, n_columns), positive semi-definite.
        damping: Share of the mean diagonal, at least 0.

    Returns:
        The same shape; a layer without any signal gets the identity.
    """
    diagonal = curvature.diagonal(dim1=1, dim2=2)
    level = diagonal.mean(dim=1)
    level = torch.where(level > 0, damping * level, torch.ones_like(level))
    return curvature + torch.diag_embed(level[:, None].expand_as(diagonal))


def single_losses(weight: Tensor, curvature: Tensor) -> Tensor:
    """w² / [H⁻¹]_jj: error of a row when this weight alone goes and the others are re-fitted.

    Args:
        weight: (groups, n_rows, n_columns).
        curvature: (groups, n_columns, n_columns), positive definite.

    Returns:
        float32, the shape of `weight`.

    Source:
        Hassibi and Stork, 1993, equation 5 (there with the factor 1/2).
    """
    inverse = torch.linalg.inv(curvature.double())
    diagonal = inverse.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(torch.float64).tiny)
    losses: Tensor = weight.double().square() / diagonal[:, None]
    return losses.float()


def eliminate_row(weight: np.ndarray, inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Remove the weights of one row one by one, each time the one whose loss is least after all others are re-fitted.

    Args:
        weight: float32 (n_columns,).
        inverse: float32 (n_columns, n_columns), the inverse of the curvature; it is left as it is.

    Returns:
        The order, int64 (n_columns,), first the one that goes first; and what each removal adds to the row's error,
        float64 (n_columns,).

    Source:
        Frantar and Alistarh, "Optimal brain compression", NeurIPS 2022, algorithm 1.
    """
    n = len(weight)
    order, losses = np.empty(n, dtype=np.int64), np.empty(n)
    w, rest = weight.astype(np.float32), np.array(inverse, dtype=np.float32)
    alive, gone = np.arange(n), np.zeros(n, dtype=bool)
    for step in range(n):
        loss = w * w / rest.diagonal()
        loss[gone] = np.inf
        q = int(loss.argmin())
        order[step], losses[step] = alive[q], loss[q]
        column = rest[:, q].copy()
        pulled = column / column[q]
        w -= pulled * w[q]
        # One step of Gaussian elimination: the inverse of H without row and column q. By torch, because BLAS as numpy
        # calls it would start threads of its own.
        torch.from_numpy(rest).addr_(torch.from_numpy(pulled), torch.from_numpy(column), alpha=-1.0)
        # What is gone stays harmless: its row and column are 0 now but for rounding.
        rest[:, q] = rest[q] = 0.0
        rest[q, q], w[q], gone[q] = 1.0, 0.0, True
        if (step + 1) % _COMPACT_EVERY == 0:
            keep = np.flatnonzero(~gone)
            alive, w, gone = alive[keep], w[keep], np.zeros(len(keep), dtype=bool)
            rest = np.ascontiguousarray(rest[np.ix_(keep, keep)])
    return order, losses


def elimination_losses(weight: Tensor, curvature: Tensor, max_columns: int = MAX_COLUMNS) -> Tensor:
    """What each weight's removal adds to the error of its row, in the exact order of elimination.

    Within a row a later removal never gets less than an earlier one, so that cutting at any level keeps the order.

    Args:
        weight: (groups, n_rows, n_columns).
        curvature: (groups, n_columns, n_columns), positive definite.
        max_columns: Wider rows take the order of their single losses.

    Returns:
        float32, the shape of `weight`.
    """
    if weight.shape[2] > max_columns:
        return single_losses(weight, curvature)
    inverse = torch.linalg.inv(curvature.double()).float().numpy()
    found = np.empty(tuple(weight.shape), dtype=np.float32)
    rows = weight.detach().float().numpy()
    for group in range(len(rows)):
        for row in range(rows.shape[1]):
            order, losses = eliminate_row(rows[group, row], inverse[group])
            # Rounding may leave a hair below what went before.
            found[group, row, order] = np.maximum.accumulate(np.maximum(losses, 0.0))
    return torch.from_numpy(found)


def _by_sensitivity(losses: Tensor, sensitivity: Tensor) -> Tensor:
    return losses * sensitivity.view(losses.shape[0], losses.shape[1], 1)


def curvature_scores(
    weights: Mapping[str, Tensor],
    statistics: Mapping[str, LayerStatistics],
    *,
    exact: bool,
    damping: float = DAMPING,
    max_columns: int = MAX_COLUMNS,
) -> dict[str, Tensor]:
    """Score the weights of every layer by what their removal costs the logits, after re-fitting.

    Args:
        weights: By tensor name, each (n_rows, ...).
        statistics: By tensor name.
        exact: Whether to follow the elimination weight by weight (`elimination_losses`) instead of taking each weight's
            single loss (`single_losses`).
        damping: See `damped`.
        max_columns: Of layers with more inputs the single losses are taken all the same.

    Returns:
        By tensor name, float32 in the tensor's shape. A tensor without statistics gets its squared weights: transposed
        convolutions, and what the network never runs.
    """
    scores = {}
    for name, weight in weights.items():
        layer = statistics.get(name)
        if layer is None:
            _LOGGER.warning("'%s' has no statistics; its weights are scored by their squares", name)
            scores[name] = weight.detach().float().square()
            continue
        grouped = weight.detach().float().reshape(layer.mean.shape[0], -1, layer.mean.shape[1])
        if exact and grouped.shape[2] > max_columns:
            _LOGGER.info(
                "'%s' has %d inputs: its weights are taken in the order of their single losses, as the exact order "
                "would take long above %d",
                name,
                grouped.shape[2],
                max_columns,
            )
        curvature = damped(layer.curvature, damping)
        losses = elimination_losses(grouped, curvature, max_columns) if exact else single_losses(grouped, curvature)
        scores[name] = _by_sensitivity(losses, layer.sensitivity).reshape(weight.shape)
    return scores
