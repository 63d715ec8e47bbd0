"""Choosing how to compute: what is taken where, and what is said about it."""

import logging
import math
from collections.abc import Callable
from typing import Any

import architectures
import numpy as np
import pytest
import torch
from architectures import made
from evaluators import N_EVALUATED, evaluator, search_split, unpacked
from paretoprune.devices import default_batch_size
from paretoprune.evaluation import compute
from paretoprune.evaluation.fused import FusedNetwork
from paretoprune.evaluation.layerwise import LayerwiseNetwork
from paretoprune.evaluation.metrics import predict, top1_error
from paretoprune.masks.packed import PackedMasks
from small_networks import (
    digits,
    fit,
    naive_network,
    some_masks,
    trained,
)
from torch import Tensor, nn

KINDS = ("residual", "foreign")
REPAIRS = ("none", "batchnorm")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_networks_of_the_tests_take_the_fast_path_in_the_precision_asked_for(kind: str, precision: str) -> None:
    evaluate = evaluator(trained(kind), precision=precision)
    assert evaluate.is_fused
    assert evaluate.precision == precision


@pytest.mark.parametrize("has_arithmetic", [True, False])
def test_precision_auto_is_bfloat16_where_the_device_computes_in_it(
    has_arithmetic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "computes_bfloat16", lambda device: has_arithmetic)
    evaluate = evaluator(trained("residual"), precision="auto")
    assert evaluate.precision == ("bfloat16" if has_arithmetic else "float32")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"objective": "loss"}, "expected an objective among error, divergence, found 'loss'"),
        ({"precision": "int8"}, "expected a precision among float32, bfloat16 and auto, found 'int8'"),
        ({"repair": "magic"}, "expected a repair mode among none, batchnorm, reconstruct, found 'magic'"),
    ],
)
def test_an_unknown_option_is_named_with_the_known_ones(option: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluator(trained("residual"), **option)  # type: ignore[arg-type]


def test_a_dense_network_that_answers_nan_is_refused() -> None:
    network = trained("residual")
    network.get_parameter("linear.bias").data[3] = math.nan
    with pytest.raises(ValueError, match="dense network's answers are not finite"):
        evaluator(network)


def test_images_in_a_batch_are_as_many_as_fit_a_core_s_caches() -> None:
    sizes = {side: default_batch_size(torch.zeros(1, 3, side, side), torch.device("cpu")) for side in (8, 32, 64, 224)}
    assert sizes == {8: 256, 32: 128, 64: 32, 224: 8}
    assert default_batch_size(torch.zeros(1, 3, 32, 32), torch.device("cuda")) == 1024


def naive_objectives(network: nn.Module, masks: PackedMasks, repair: str) -> np.ndarray:
    """Top-1 errors of naive networks."""
    images, labels = search_split()
    return np.array(
        [top1_error(predict(naive_network(network, m, repair), images, 64), labels) for m in unpacked(masks)]
    )


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (architectures.Branching, "control flow"),
        (architectures.ReadAfterInPlace, "changes a tensor in place that is read again"),
        (architectures.TakesTwo, "its forward takes 2 arguments instead of one"),
    ],
)
def test_a_network_that_cannot_be_traced_is_evaluated_layer_by_layer_and_the_log_says_why(
    kind: Callable[[], nn.Module], reason: str, repair: str, caplog: pytest.LogCaptureFixture
) -> None:
    network = made(kind)
    masks = some_masks(network)
    with caplog.at_level(logging.INFO, "paretoprune"):
        evaluate = evaluator(network, repair)
    assert not evaluate.is_fused
    assert caplog.messages[0].startswith("the fused float32 path does not take this network: ")
    assert reason in caplog.messages[0]
    assert "candidates are evaluated in float32, layer by layer" in caplog.messages
    assert all(record.levelno == logging.INFO for record in caplog.records)
    # The untrained networks' answers are close to one another: an image or two on the edge may turn.
    np.testing.assert_allclose(
        evaluate.score(masks).error, naive_objectives(network, masks, repair), rtol=0, atol=2.01 / N_EVALUATED
    )


def test_a_network_that_cannot_be_traced_is_evaluated_layer_by_layer_in_bfloat16_too() -> None:
    evaluate = evaluator(made(architectures.Branching), precision="bfloat16")
    assert not evaluate.is_fused
    assert isinstance(evaluate.network, LayerwiseNetwork)
    assert evaluate.precision == "bfloat16"


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize(
    "kind",
    [
        architectures.ReadAfterSharedInPlace,
        architectures.ViewOfInPlace,
        architectures.InPlaceOnView,
        architectures.Hooked,
        architectures.OwnNorms,
    ],
)
def test_networks_that_mislead_a_tracer_are_evaluated_right_all_the_same(
    kind: Callable[[], nn.Module], repair: str
) -> None:
    images, labels = digits()
    network = made(kind)
    # What is changed in place cannot be trained.
    in_place = [module for module in network.modules() if isinstance(module, nn.ReLU)]
    for module in in_place:
        module.inplace = False
    fit(network, images[:1000], labels[:1000], epochs=3)
    for module in in_place:
        module.inplace = True
    masks = some_masks(network)
    found = evaluator(network, repair).score(masks).error
    np.testing.assert_allclose(found, naive_objectives(network, masks, repair), rtol=0, atol=1.01 / N_EVALUATED)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fast_path_that_answers_otherwise_is_not_used_and_warned_about(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network = trained(kind)
    masks, expected = some_masks(network), evaluator(network).score(some_masks(network)).error
    generator = torch.Generator().manual_seed(0)

    def noise(self: FusedNetwork, images: Tensor, *rest: Any) -> Tensor:
        return torch.randn(len(images), 10, generator=generator)

    monkeypatch.setattr(FusedNetwork, "answer", noise)
    with caplog.at_level(logging.WARNING, "paretoprune"):
        evaluate = evaluator(network)
    assert not evaluate.is_fused
    assert len(caplog.messages) == 1
    assert "fused float32 path against float32 layer by layer" in caplog.text
    assert "that is too much, and it is not used" in caplog.text
    # Two ways of computing may differ on an image on the edge.
    np.testing.assert_allclose(evaluate.score(masks).error, expected, rtol=0, atol=1.01 / N_EVALUATED)


def test_a_fast_path_that_is_wrong_for_pruned_networks_only_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prepare = FusedNetwork.prepare

    def dense_always(self: FusedNetwork, kept: Tensor, *rest: Any) -> None:
        prepare(self, torch.ones_like(kept), *rest)

    monkeypatch.setattr(FusedNetwork, "prepare", dense_always)
    with caplog.at_level(logging.WARNING, "paretoprune"):
        assert not evaluator(trained("residual")).is_fused
    assert "it is not used" in caplog.text


@pytest.mark.parametrize("error", [RuntimeError("could not create a primitive"), ValueError("odd"), IndexError("odd")])
def test_a_fast_path_that_fails_is_not_used_and_warned_about(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*given: Any) -> None:
        raise error

    monkeypatch.setattr(FusedNetwork, "prepare", failing)
    with caplog.at_level(logging.WARNING, "paretoprune"):
        assert not evaluator(trained("residual")).is_fused
    assert caplog.messages == [f"the fused float32 path fails on this network: {error}"]


@pytest.mark.parametrize("workers", [0, -1])
def test_at_least_one_process_evaluates(workers: int) -> None:
    assert evaluator(trained("residual"), workers=workers).n_workers == 1
