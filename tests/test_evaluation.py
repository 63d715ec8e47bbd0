"""Judging masks: the evaluator against a naive loop, its purity, its two objectives, and what it builds."""

import copy
import math

import numpy as np
import pytest
import torch
from paretoprune.evaluation import PopulationEvaluator, Scores, divergence, predict, top1_error
from paretoprune.masks import MaskLayout, PackedMasks
from small_networks import digits, magnitude_mask, n_hooks, states_equal, trained
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

KINDS = ("residual", "foreign")
REPAIRS = ("none", "batchnorm")
N_JUDGED = 300


def judged() -> tuple[Tensor, Tensor]:
    images, labels = digits()
    return images[1000 : 1000 + N_JUDGED], labels[1000 : 1000 + N_JUDGED]


def calibration() -> Tensor:
    return digits()[0][:200]


def evaluator(
    network: nn.Module,
    repair: str = "batchnorm",
    *,
    objective: str = "error",
    precision: str = "float32",
    batch_size: int = 64,
    device: str = "cpu",
) -> PopulationEvaluator:
    images, labels = judged()
    return PopulationEvaluator(
        network,
        MaskLayout.of(network),
        images,
        labels,
        repair=repair,
        calibration_images=calibration(),
        objective=objective,
        precision=precision,
        batch_size=batch_size,
        device=device,
    )


def some_masks(network: nn.Module) -> PackedMasks:
    """All, nothing, random, and by magnitude, and one with a whole tensor gone."""
    layout, rng = MaskLayout.of(network), np.random.default_rng(7)
    rows = [np.ones(layout.n_weights, dtype=bool), np.zeros(layout.n_weights, dtype=bool)]
    rows += [rng.random(layout.n_weights) < density for density in (0.9, 0.5)]
    rows += [magnitude_mask(network, layout, density) for density in (0.6, 0.3, 0.1)]
    without_one = magnitude_mask(network, layout, 0.7)
    without_one[layout.offsets[1] : layout.offsets[2]] = False
    return PackedMasks.pack(np.array([*rows, without_one]))


def inputs_of(network: nn.Module, layer: nn.Module, images: Tensor) -> Tensor:
    """What a layer is given, in float64 (channels, everything else)."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(images)
    handle.remove()
    return seen[0].double().transpose(0, 1).flatten(1)


def naive_network(network: nn.Module, mask: np.ndarray, repair: str) -> nn.Module:
    """Multiply by the mask, then correct one batch norm after the other, each from a forward pass of its own."""
    pruned = copy.deepcopy(network)
    parameters = dict(pruned.named_parameters())
    for name, part in MaskLayout.of(network).split(mask).items():
        parameters[name].data *= torch.from_numpy(part)
    if repair == "none":
        return pruned
    # In both networks the order of definition is the order of execution.
    for (_, dense), (_, layer) in zip(network.named_modules(), pruned.named_modules(), strict=True):
        if isinstance(layer, _BatchNorm) and isinstance(dense, _BatchNorm):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            before, after = inputs_of(network, dense, calibration()), inputs_of(pruned, layer, calibration())
            ratio = after.var(1, correction=0) / before.var(1, correction=0)
            shift = layer.running_mean.double() - before.mean(1)
            layer.running_mean.copy_(after.mean(1) + shift * ratio.sqrt())
            layer.running_var.copy_(layer.running_var.double() * ratio)
    return pruned


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_evaluator_agrees_with_a_naive_loop_over_single_networks(kind: str, repair: str) -> None:
    network, (images, labels) = trained(kind), judged()
    masks = some_masks(network)
    evaluate = evaluator(network, repair)
    scores = evaluate.score(masks)
    with torch.no_grad():
        dense = network(images).log_softmax(1).double()
    for i in range(len(masks)):
        with torch.no_grad():
            logits = naive_network(network, masks.unpack(i), repair)(images)
        n_wrong = int((logits.argmax(1) != labels).sum())
        # Sums in another order may turn the answer to one image on the edge between two classes.
        assert abs(scores.error[i] - n_wrong / N_JUDGED) <= 1.01 / N_JUDGED
        kl = (dense.exp() * (dense - logits.log_softmax(1).double())).sum(1).mean()
        # float32 logits of size ten are good to about 1e-6, and 1 - exp(-x) is no steeper than 1.
        assert scores.divergence[i] == pytest.approx(1 - math.exp(-kl), abs=1e-4)
    assert np.array_equal(evaluate(masks), np.column_stack([scores.error, masks.density]))


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_built_networks_answer_as_the_naive_ones(kind: str, repair: str) -> None:
    network, (images, _) = trained(kind), judged()
    masks = some_masks(network)
    evaluate = evaluator(network, repair)
    for i in range(len(masks)):
        expected = predict(naive_network(network, masks.unpack(i), repair), images, 50)
        found = predict(evaluate.build(masks.unpack(i)), images, 64)
        # The kernel behind the statistics adds thousands of float32 numbers one by one: where a channel hardly varies,
        # its mean is off by a thousandth of its deviation, and so are logits of size ten.
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_built_network_has_the_judged_error_and_zeros_exactly_outside_the_mask(kind: str) -> None:
    network, (images, labels) = trained(kind), judged()
    evaluate, layout = evaluator(network), MaskLayout.of(network)
    masks = some_masks(network)
    errors = evaluate.score(masks).error
    originals = dict(network.named_parameters())
    for i in range(len(masks)):
        built = evaluate.build(masks.unpack(i))
        assert n_hooks(built) == 0
        assert not built.training
        assert built.state_dict().keys() == network.state_dict().keys()
        parameters = dict(built.named_parameters())
        for name, kept in layout.split(masks.unpack(i)).items():
            expected = torch.where(torch.from_numpy(kept), originals[name], torch.zeros(()))
            assert torch.equal(parameters[name], expected), name
        # The judge runs in another memory layout: one image on the edge may turn.
        assert abs(top1_error(predict(built, images, 64), labels) - errors[i]) <= 1.01 / N_JUDGED


def test_weights_that_are_not_prunable_keep_their_trained_values() -> None:
    network = trained("foreign")
    built = evaluator(network).build(np.zeros(MaskLayout.of(network).n_weights, dtype=bool))
    assert torch.equal(built.get_parameter("stem.bias"), network.get_parameter("stem.bias"))
    assert torch.equal(built.get_parameter("grouped_norm.weight"), network.get_parameter("grouped_norm.weight"))


def test_built_networks_are_independent_of_one_another_and_of_the_evaluator() -> None:
    network = trained("residual")
    evaluate, masks = evaluator(network), some_masks(network)
    first = evaluate.build(masks.unpack(5))
    kept = copy.deepcopy(first)
    second = evaluate.build(masks.unpack(6))
    assert states_equal(first, kept)
    before = evaluate(masks)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.fill_(1.0)
    assert np.array_equal(evaluate(masks), before)
    assert states_equal(first, kept)


def test_a_built_network_can_be_trained_further() -> None:
    network, (images, labels) = trained("foreign"), judged()
    built = evaluator(network).build(some_masks(network).unpack(5)).train()
    functional.cross_entropy(built(images), labels).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in built.parameters())


def test_a_weight_shared_by_two_layers_stays_shared_in_a_built_network() -> None:
    network = trained("foreign")
    built = evaluator(network).build(some_masks(network).unpack(5))
    assert built.get_parameter("first.weight") is built.get_submodule("second").weight


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_masks_get_equal_objectives_whatever_was_judged_before(kind: str, repair: str) -> None:
    network = trained(kind)
    for objective in ("error", "divergence"):
        evaluate = evaluator(network, repair, objective=objective)
        masks = some_masks(network)
        once = evaluate(masks)
        assert np.array_equal(evaluate(masks), once)
        order = np.random.default_rng(3).permutation(len(masks))
        assert np.array_equal(evaluate(masks.select(order)), once[order])
        evaluate.build(masks.unpack(1))
        alone = np.concatenate([evaluate(masks.select([i])) for i in range(len(masks))])
        assert np.array_equal(alone, once)
        assert np.array_equal(evaluator(network, repair, objective=objective)(masks), once)


def test_buffers_that_a_forward_pass_changes_do_not_carry_over_to_the_next_mask() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = trained("residual")
            self.register_buffer("n_passes", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            passes = self.get_buffer("n_passes")
            passes += 1
            return self.inner(x) + passes * torch.arange(10)

    evaluate = evaluator(Counting(), "none")
    mask = PackedMasks.pack(np.ones((1, MaskLayout.of(Counting()).n_weights), dtype=bool))
    first = evaluate.score(mask)
    second = evaluate.score(mask)
    assert (first.error[0], first.divergence[0]) == (second.error[0], second.divergence[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_given_network_is_left_as_it_is(kind: str) -> None:
    network = trained(kind).train()
    before = copy.deepcopy(network)
    evaluate = evaluator(network)
    evaluate(some_masks(network))
    evaluate.build(some_masks(network).unpack(5))
    assert states_equal(network, before)
    assert network.training
    assert n_hooks(network) == 0
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_the_full_mask_gets_the_dense_network_s_objectives() -> None:
    network, (images, labels) = trained("residual"), judged()
    evaluate = evaluator(network)
    full = evaluate.score(PackedMasks.pack(np.ones((1, evaluate.layout.n_weights), dtype=bool)))
    assert evaluate.dense.error[0] == pytest.approx(top1_error(predict(network, images, 64), labels), abs=1.01 / 300)
    assert evaluate.dense.divergence[0] == 0
    assert full.error[0] == pytest.approx(evaluate.dense.error[0], abs=1.01 / N_JUDGED)
    # Repaired statistics equal the trained ones up to float32 rounding.
    assert full.divergence[0] == pytest.approx(0, abs=1e-6)
    assert evaluate.n_classes == 10


def test_no_masks_give_no_objectives() -> None:
    evaluate = evaluator(trained("residual"))
    assert evaluate(PackedMasks.empty(evaluate.layout.n_weights)).shape == (0, 2)


def test_the_size_of_batches_does_not_change_what_is_found() -> None:
    network = trained("foreign")
    masks = some_masks(network)
    whole, parts = (evaluator(network, batch_size=size).score(masks) for size in (N_JUDGED, 7))
    # Kernels may sum batches of another size in another order: at most one image on the edge.
    np.testing.assert_allclose(parts.error, whole.error, rtol=0, atol=1.01 / N_JUDGED)
    np.testing.assert_allclose(parts.divergence, whole.divergence, rtol=0, atol=1e-4)


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_agrees_with_float32(kind: str, repair: str) -> None:
    network = trained(kind)
    layout = MaskLayout.of(network)
    masks = PackedMasks.pack(np.array([magnitude_mask(network, layout, d) for d in (1.0, 0.8, 0.6, 0.4)]))
    exact = evaluator(network, repair).score(masks)
    rough = evaluator(network, repair, precision="bfloat16").score(masks)
    # Eight bits of mantissa: 0.4 % a value, through a few layers a percent or two of the logits. That turns the
    # images nearest to the edge between two classes, a few in a hundred for a pruned network.
    np.testing.assert_allclose(rough.error, exact.error, rtol=0, atol=0.03)
    np.testing.assert_allclose(rough.divergence, exact.divergence, rtol=0, atol=0.03)


def test_trained_statistics_are_not_rounded_in_bfloat16() -> None:
    network = trained("residual")
    judge = evaluator(network, precision="bfloat16")
    exact = dict(network.named_buffers())
    statistics = {
        name: buffer
        for name, buffer in judge._work.named_buffers()
        if name.split(".")[-1] in ("running_mean", "running_var")
    }
    assert len(statistics) >= 4
    assert all(torch.equal(buffer, exact[name]) for name, buffer in statistics.items())


def test_networks_to_keep_are_not_built_from_rounded_weights() -> None:
    evaluate = evaluator(trained("residual"), precision="bfloat16")
    with pytest.raises(ValueError, match="only an evaluator with precision 'float32' builds networks"):
        evaluate.build(np.ones(evaluate.layout.n_weights, dtype=bool))


def test_three_dimensional_convolutions_can_be_judged() -> None:
    class Volume(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(1, 4, (1, 3, 3))
            self.linear = nn.Linear(4 * 36, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.conv(x[:, None]).flatten(1))

    network = Volume()
    evaluate = evaluator(network, "none")
    mask = PackedMasks.pack(np.ones((1, evaluate.layout.n_weights), dtype=bool))
    assert evaluate.score(mask).divergence[0] == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"objective": "loss"}, "expected an objective among error, divergence, found 'loss'"),
        ({"precision": "int8"}, "expected a precision among float32, bfloat16, found 'int8'"),
        ({"repair": "magic"}, "expected a repair mode among none, batchnorm, found 'magic'"),
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


def test_top1_error_is_the_share_of_wrong_answers() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0], [1.0, 0.0]])
    assert top1_error(logits, torch.tensor([0, 1, 1, 0])) == 0.25


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_answer_that_is_not_finite_counts_as_wrong(bad: float) -> None:
    logits = torch.tensor([[2.0, 1.0], [bad, 0.0], [0.0, bad], [-bad, 1.0]])
    assert top1_error(logits, torch.tensor([0, 0, 1, 1])) == 0.75


def test_divergence_of_the_dense_answers_is_zero() -> None:
    logits = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    assert divergence(logits, logits.double().log_softmax(1)) == pytest.approx(0, abs=1e-12)
    # Adding a constant to an image's logits changes no answer.
    assert divergence(logits + 3, logits.double().log_softmax(1)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("n_classes", [2, 10, 100])
def test_divergence_of_uniform_answers_is_one_minus_the_share_of_a_guess(n_classes: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for sharpness in (0.0, 1.0, 5.0, 1000.0):
        teacher = (sharpness * torch.randn(50, n_classes, generator=generator)).double().log_softmax(1)
        # KL from the teacher to uniform is log C less the teacher's mean entropy.
        entropy = -(teacher.exp() * teacher).sum(1).mean().item()
        found = divergence(torch.zeros(50, n_classes), teacher)
        assert found == pytest.approx(1 - math.exp(entropy) / n_classes, abs=1e-9)
        if sharpness == 1000:
            # Two of a thousand standard deviations are rarely close, so the teacher is all but certain.
            assert found == pytest.approx(1 - 1 / n_classes, abs=0.02)


def test_divergence_of_answers_that_are_not_finite_is_one() -> None:
    dense = torch.zeros(3, 4).double().log_softmax(1)
    for bad in (math.nan, math.inf):
        logits = torch.zeros(3, 4)
        logits[1, 2] = bad
        assert divergence(logits, dense) == 1.0


def test_divergence_grows_with_the_distance_from_the_dense_answers() -> None:
    generator = torch.Generator().manual_seed(2)
    dense, other = torch.randn(2, 30, 5, generator=generator, dtype=torch.float64).unbind()
    found = [divergence(dense + step * (other - dense), dense.log_softmax(1)) for step in (0, 0.1, 0.5, 1, 2, 10, 1e4)]
    assert found == sorted(found)
    assert len(set(found)) == len(found)
    assert found[0] == 0
    assert found[-1] <= 1


def test_scores_give_the_objective_that_is_asked_for() -> None:
    scores = Scores(np.array([0.1, 0.2]), np.array([0.3, 0.4]))
    assert scores.objective("error").tolist() == [0.1, 0.2]
    assert scores.objective("divergence").tolist() == [0.3, 0.4]


def test_predict_leaves_out_no_image_and_keeps_their_order() -> None:
    network, (images, _) = trained("foreign"), judged()
    with torch.no_grad():
        torch.testing.assert_close(predict(network, images, 7), network(images), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_finds_what_the_cpu_finds(kind: str, repair: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    network = trained(kind)
    masks = some_masks(network)
    on_cpu, on_gpu = (evaluator(network, repair, device=device) for device in ("cpu", "cuda"))
    expected, found = on_cpu.score(masks), on_gpu.score(masks)
    # TF32 in convolutions keeps ten bits: a few images in three hundred may turn, and logits move by a percent.
    np.testing.assert_allclose(found.error, expected.error, rtol=0, atol=0.02)
    np.testing.assert_allclose(found.divergence, expected.divergence, rtol=0, atol=0.02)
    assert np.array_equal(on_gpu(masks), on_gpu(masks))
    built = on_gpu.build(masks.unpack(5))
    assert {parameter.device.type for parameter in built.parameters()} == {"cpu"}
