"""The training loop: its schedule by hand, masks that hold, resuming bit for bit, and divergence."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paretoprune.data.splits import LabelledImages
from paretoprune.evaluation.metrics import predict, top1_error
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.architectures import CifarResNet
from paretoprune.training.loop import (
    TRAINING_COLUMNS,
    Recipe,
    TrainingDivergedError,
    augment,
    check_mask,
    learning_rate,
    train,
)
from small_networks import fresh, states_equal
from torch import Tensor, nn
from torch.nn import functional


def blobs(n: int = 120, seed: int = 0) -> LabelledImages:
    """Three classes of noisy 8x8 images, each with a bright part of its own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = 0.3 * torch.randn(n, 1, 8, 8, generator=generator)
    for i, label in enumerate(labels.tolist()):
        images[i, :, :, 3 * label : 3 * label + 2] += 1.5
    return LabelledImages(images, labels)


def linear() -> nn.Module:
    """A network without batch norm, whose loss is easily computed again."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def residual(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CifarResNet(8, 3, 1, base_width=3)


def masks_of(network: nn.Module, density: float) -> dict[str, Tensor]:
    layout = WeightUnits.of(network)
    flat = np.random.default_rng(0).random(layout.n_weights) < density
    return {name: torch.from_numpy(part.copy()) for name, part in layout.split(flat).items()}


def test_the_learning_rate_rises_linearly_and_falls_as_half_a_cosine() -> None:
    recipe = Recipe(epochs=10, learning_rate=0.4, warmup_epochs=2)
    by_hand = {0: 0.0, 0.5: 0.1, 1: 0.2, 2: 0.4, 4: 0.4 * (1 + math.sqrt(0.5)) / 2, 6: 0.2, 10: 0.0}
    for epoch, expected in by_hand.items():
        assert learning_rate(recipe, epoch) == pytest.approx(expected, abs=1e-12), epoch


def test_without_warm_up_the_schedule_starts_at_its_peak() -> None:
    recipe = Recipe(epochs=4, learning_rate=0.4, warmup_epochs=0)
    assert [learning_rate(recipe, e) for e in (0, 2, 4)] == pytest.approx([0.4, 0.2, 0.0], abs=1e-12)


def test_the_warm_up_takes_at_most_half_of_the_training() -> None:
    recipe = Recipe(epochs=2, learning_rate=0.4, warmup_epochs=5)
    assert [learning_rate(recipe, e) for e in (0.5, 1, 1.5, 2)] == pytest.approx([0.2, 0.4, 0.2, 0.0], abs=1e-12)


def numbered(n: int, channels: int, height: int, width: int) -> Tensor:
    """Images whose pixels all differ and none of which is 0."""
    return torch.arange(1, n * channels * height * width + 1).float().view(n, channels, height, width)


def test_augmented_images_are_shifted_over_zeros_and_perhaps_mirrored() -> None:
    images, crop = numbered(200, 2, 5, 7), 2
    found = augment(images, crop, True, torch.Generator().manual_seed(0))
    seen = set()
    for before, after in zip(images, found, strict=True):
        padded = functional.pad(before, (crop,) * 4)
        for top in range(2 * crop + 1):
            for left in range(2 * crop + 1):
                window = padded[:, top : top + 5, left : left + 7]
                seen |= {(top, left, m) for m, w in ((0, window), (1, window.flip(2))) if torch.equal(after, w)}
    # Each of 200 images is one of 5 x 5 shifts, mirrored or not; all fifty would take luck to be missed by many.
    assert len(seen) >= 45
    assert {shift for shift, _, _ in seen} == {shift for _, shift, _ in seen} == set(range(5))
    matched = [
        any(
            torch.equal(after, w)
            for top, left, _ in seen
            for p in [functional.pad(before, (crop,) * 4)[:, top : top + 5, left : left + 7]]
            for w in (p, p.flip(2))
        )
        for before, after in zip(images, found, strict=True)
    ]
    assert all(matched)


def test_about_half_of_the_images_are_mirrored_exactly() -> None:
    images = numbered(400, 1, 3, 4)
    found = augment(images, 0, True, torch.Generator().manual_seed(0))
    mirrored = [torch.equal(after, before.flip(2)) for before, after in zip(images, found, strict=True)]
    same = [torch.equal(after, before) for before, after in zip(images, found, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    # Four standard deviations of 400 tosses are 40.
    assert 160 <= sum(mirrored) <= 240


def test_no_augmentation_changes_nothing() -> None:
    images = numbered(3, 2, 4, 4)
    assert torch.equal(augment(images, 0, False, torch.Generator().manual_seed(0)), images)


def test_augmentation_is_fixed_by_its_generator_and_leaves_its_input() -> None:
    images = numbered(50, 1, 6, 6)
    first, second, third = (augment(images, 2, True, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(images, numbered(50, 1, 6, 6))


def test_a_small_network_learns_what_is_easy_to_learn() -> None:
    recipe = Recipe(epochs=6, batch_size=20, learning_rate=0.1)
    network, history = train(residual(), blobs(), recipe, seed=0)
    unseen = blobs(90, seed=1)
    # The classes are five standard deviations apart.
    assert top1_error(predict(network, unseen.images, 64), unseen.labels) <= 0.03
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert all(tuple(row) == TRAINING_COLUMNS for row in history)
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]
    assert history[-1]["train_error"] <= 0.03
    # The rate falls to the middle of the last step.
    assert 0 < history[-1]["learning_rate"] < 0.01 * recipe.learning_rate
    assert not network.training
    assert {p.device.type for p in network.parameters()} == {"cpu"}


def test_the_network_passed_in_and_global_random_state_stay_as_they_were() -> None:
    network, teacher = residual(), residual(1).train()
    before, teacher_before, state = copy.deepcopy(network), copy.deepcopy(teacher), torch.get_rng_state()
    recipe = Recipe(epochs=1, batch_size=20, crop=1, flip=True, distillation=0.5)
    trained, _ = train(network, blobs(), recipe, seed=0, teacher=teacher, masks=masks_of(network, 0.5))
    assert not states_equal(trained, network)
    assert states_equal(network, before)
    assert states_equal(teacher, teacher_before)
    assert teacher.training
    assert all(p.requires_grad and p.grad is None for p in [*network.parameters(), *teacher.parameters()])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    recipe = Recipe(epochs=2, batch_size=20, crop=1, flip=True)
    first, second, third = (train(residual(), blobs(), recipe, seed=s) for s in (1, 1, 2))
    assert states_equal(first[0], second[0])
    assert first[1] == second[1]
    assert not states_equal(first[0], third[0])


def test_every_epoch_sees_every_image_once_and_in_an_order_of_its_own() -> None:
    seen: list[int] = []

    class Recording(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1, 3)

        def forward(self, x: Tensor) -> Tensor:
            seen.extend(x.flatten().long().tolist())
            return self.linear(x.flatten(1) / 30)

    data = LabelledImages(torch.arange(30.0).view(30, 1, 1, 1), torch.arange(30) % 3)
    train(Recording(), data, Recipe(epochs=3, batch_size=10), seed=0)
    orders = [seen[:30], seen[30:60], seen[60:]]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert len({tuple(order) for order in [*orders, range(30)]}) == 4


def test_dropout_is_fixed_by_the_seed_too() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3))
    recipe = Recipe(epochs=1, batch_size=20)
    torch.manual_seed(1)
    first, _ = train(network, blobs(), recipe, seed=0)
    torch.manual_seed(2)
    second, _ = train(network, blobs(), recipe, seed=0)
    assert states_equal(first, second)


def test_the_loss_of_the_first_step_is_that_of_the_network_as_it_was() -> None:
    data, network = blobs(30), linear()
    _, history = train(network, data, Recipe(epochs=2, batch_size=30), seed=0)
    with torch.no_grad():
        logits = network(data.images)
    assert history[0]["loss"] == pytest.approx(functional.cross_entropy(logits, data.labels).item(), rel=1e-5)
    assert history[0]["train_error"] == pytest.approx(top1_error(logits, data.labels))


def test_the_loss_with_smoothed_labels_by_hand() -> None:
    data, network = blobs(30), linear()
    _, history = train(network, data, Recipe(epochs=2, batch_size=30, label_smoothing=0.3), seed=0)
    with torch.no_grad():
        answers = network(data.images).log_softmax(1)
    target = 0.7 * functional.one_hot(data.labels, 3) + 0.1
    assert history[0]["loss"] == pytest.approx(-(target * answers).sum(1).mean().item(), rel=1e-5)


def test_the_loss_with_distillation_by_hand() -> None:
    data, network, teacher = blobs(30), linear(), residual().eval()
    recipe = Recipe(epochs=2, batch_size=30, distillation=0.7, temperature=3.0)
    _, history = train(network, data, recipe, seed=0, teacher=teacher)
    with torch.no_grad():
        logits, wanted = network(data.images), (teacher(data.images) / 3).softmax(1)
    kl = (wanted * (wanted.log() - (logits / 3).log_softmax(1))).sum(1).mean()
    expected = 0.3 * functional.cross_entropy(logits, data.labels) + 0.7 * 9 * kl
    assert history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_student_follows_its_teacher_rather_than_wrong_labels() -> None:
    data = blobs()
    teacher, _ = train(residual(), data, Recipe(epochs=6, batch_size=20), seed=0)
    wrong = LabelledImages(data.images, (data.labels + 1) % 3)
    student, _ = train(residual(1), wrong, Recipe(epochs=8, batch_size=20, distillation=1.0), seed=0, teacher=teacher)
    unseen = blobs(90, seed=1)
    agreement = predict(student, unseen.images, 64).argmax(1) == predict(teacher, unseen.images, 64).argmax(1)
    assert agreement.double().mean() > 0.9


def test_a_teacher_is_ignored_where_the_recipe_has_no_distillation() -> None:
    recipe = Recipe(epochs=1, batch_size=20)
    alone, _ = train(linear(), blobs(), recipe, seed=0)
    taught, _ = train(linear(), blobs(), recipe, seed=0, teacher=residual())
    assert states_equal(alone, taught)


def test_distillation_without_a_teacher_is_an_error() -> None:
    with pytest.raises(ValueError, match="a recipe with distillation needs a teacher, found none"):
        train(linear(), blobs(), Recipe(epochs=1, distillation=0.5), seed=0)


def test_training_without_images_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected at least two training images .*, found 0 images"):
        train(linear(), blobs(0), Recipe(epochs=1), seed=0)


def test_weight_decay_shrinks_weights_and_spares_biases_and_norms() -> None:
    class Silent(nn.Module):
        """Answers zeros, so that only the weight decay pulls at its parameters."""

        def __init__(self) -> None:
            super().__init__()
            self.body = residual()

        def forward(self, x: Tensor) -> Tensor:
            return 0 * self.body(x)

    network = Silent()
    for parameter in network.parameters():
        parameter.data.fill_(1.0)
    recipe = Recipe(epochs=2, batch_size=60, learning_rate=0.5, momentum=0.0, weight_decay=0.1, warmup_epochs=0)
    trained, _ = train(network, blobs(), recipe, seed=0)
    # Two steps an epoch: w loses 0.1 times the rate of each step.
    expected = math.prod(1 - 0.1 * learning_rate(recipe, e) for e in (0.25, 0.75, 1.25, 1.75))
    for name, parameter in trained.named_parameters():
        wanted = expected if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, wanted), rtol=1e-6, atol=0, msg=name)


def test_pruned_weights_stay_zero_and_the_others_learn() -> None:
    network = residual()
    masks = masks_of(network, 0.4)
    trained, _ = train(network, blobs(), Recipe(epochs=3, batch_size=20, crop=1), seed=0, masks=masks)
    parameters, before = dict(trained.named_parameters()), dict(network.named_parameters())
    for name, kept in masks.items():
        assert torch.count_nonzero(parameters[name][~kept]) == 0, name
        assert not torch.equal(parameters[name][kept], before[name][kept]), name
    check_mask(trained, masks)
    # Weights without a mask are free.
    assert torch.count_nonzero(parameters["linear.bias"]) == 3


def test_pruned_weights_are_zero_even_after_no_step_at_all() -> None:
    network = linear()
    masks = {"1.weight": torch.zeros(3, 64, dtype=torch.bool)}
    trained, history = train(network, blobs(), Recipe(epochs=0), seed=0, masks=masks)
    assert history == []
    check_mask(trained, masks)


def test_a_violated_mask_names_the_tensor_and_counts_the_weights() -> None:
    network = residual()
    masks = masks_of(network, 0.5)
    for name, kept in masks.items():
        network.get_parameter(name).data[~kept] = 0.0
    check_mask(network, masks)
    kept = masks["layer2.0.conv1.weight"]
    weight = network.get_parameter("layer2.0.conv1.weight").data
    alive = torch.zeros_like(weight)
    alive[~kept] = torch.cat([torch.full((2,), 1e-30), torch.zeros(int((~kept).sum()) - 2)])
    weight += alive
    weight[~kept] = alive[~kept]
    with pytest.raises(
        RuntimeError,
        match=rf"expected {int((~kept).sum())} pruned weights in 'layer2\.0\.conv1\.weight' .*found 2 that",
    ):
        check_mask(network, masks)


def test_a_pruned_weight_that_is_nan_violates_its_mask() -> None:
    network = linear()
    network.get_parameter("1.weight").data.zero_()
    network.get_parameter("1.weight").data[0, 0] = math.nan
    with pytest.raises(RuntimeError, match=r"'1\.weight' to be 0, found 1"):
        check_mask(network, {"1.weight": torch.zeros(3, 64, dtype=torch.bool)})


class InterruptedError_(Exception):
    """Stands for a job that is killed."""


@pytest.mark.parametrize("after", [1, 3])
def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path, after: int) -> None:
    recipe = Recipe(epochs=4, batch_size=16, crop=1, flip=True, distillation=0.5)
    state, masks = tmp_path / "folder" / "state.resume", masks_of(residual(), 0.6)

    def run(**options: Any) -> tuple[nn.Module, list[dict[str, Any]]]:
        return train(residual(), blobs(), recipe, seed=3, masks=masks, teacher=residual(9), **options)

    whole, history = run()
    rows: list[dict[str, Any]] = []

    def interrupt(row: dict[str, Any]) -> None:
        rows.append(row)
        if row["epoch"] == after:
            raise InterruptedError_

    with pytest.raises(InterruptedError_):
        run(resume=state, progress=interrupt)
    assert state.is_file()
    continued, continued_history = run(resume=state, progress=rows.append)
    assert states_equal(continued, whole)
    assert continued_history == rows == history
    assert list(state.parent.iterdir()) == []


def test_a_finished_training_leaves_no_state(tmp_path: Path) -> None:
    train(linear(), blobs(), Recipe(epochs=2, batch_size=20), seed=0, resume=tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


def interrupted(path: Path, network: nn.Module, recipe: Recipe, seed: int) -> None:
    """Leave the state of a training after its first epoch."""

    def interrupt(row: dict[str, Any]) -> None:
        raise InterruptedError_

    with pytest.raises(InterruptedError_):
        train(network, blobs(), recipe, seed=seed, resume=path, progress=interrupt)


@pytest.mark.parametrize(
    ("recipe", "seed"), [(Recipe(epochs=3, batch_size=20), 0), (Recipe(epochs=2, batch_size=20), 1)]
)
def test_the_state_of_another_recipe_or_seed_is_ignored_with_a_warning(
    tmp_path: Path, recipe: Recipe, seed: int
) -> None:
    interrupted(tmp_path / "state", linear(), recipe, seed)
    wanted = Recipe(epochs=2, batch_size=20)
    with pytest.warns(UserWarning, match=r"state' belongs to another recipe, seed, network or other images"):
        found, history = train(linear(), blobs(), wanted, seed=0, resume=tmp_path / "state")
    assert states_equal(found, train(linear(), blobs(), wanted, seed=0)[0])
    assert len(history) == 2


def test_a_training_interrupted_before_the_splits_changed_is_not_continued(tmp_path: Path) -> None:
    # Its weights may have seen what is a test image now.
    recipe = Recipe(epochs=2, batch_size=20)
    interrupted(tmp_path / "state", linear(), recipe, 0)
    other = blobs(seed=7)
    with pytest.warns(UserWarning, match="other images; training starts afresh"):
        found, _ = train(linear(), other, recipe, seed=0, resume=tmp_path / "state")
    assert states_equal(found, train(linear(), other, recipe, seed=0)[0])


def test_the_state_of_another_network_is_ignored_with_a_warning(tmp_path: Path) -> None:
    recipe = Recipe(epochs=2, batch_size=20)
    interrupted(tmp_path / "state", residual(), recipe, 0)
    with pytest.warns(UserWarning, match="training starts afresh"):
        found, _ = train(linear(), blobs(), recipe, seed=0, resume=tmp_path / "state")
    assert states_equal(found, train(linear(), blobs(), recipe, seed=0)[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_images_that_are_not_finite_diverge_with_a_remedy_and_leave_no_state(tmp_path: Path, bad: float) -> None:
    data = blobs()
    data.images[7, 0, 0, 0] = bad
    with pytest.raises(
        TrainingDivergedError, match=r"the loss became (nan|inf) in epoch 1 of 2, step \d.*check the imag"
    ):
        train(linear(), data, Recipe(epochs=2, batch_size=20), seed=0, resume=tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


def test_a_huge_learning_rate_diverges_with_a_remedy_and_leaves_no_state(tmp_path: Path) -> None:
    recipe = Recipe(epochs=6, batch_size=20, learning_rate=1e12)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    with pytest.raises(TrainingDivergedError, match=r"lower the learning_rate \(now 1000000000000\.0\), lengthen"):
        train(network, blobs(), recipe, seed=0, resume=tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


def test_diverging_is_an_arithmetic_error() -> None:
    assert issubclass(TrainingDivergedError, ArithmeticError)


def test_a_last_batch_of_one_image_does_not_break_batch_norm() -> None:
    _, history = train(residual(), blobs(21), Recipe(epochs=1, batch_size=10), seed=0)
    assert math.isfinite(history[0]["loss"])


@pytest.mark.parametrize(("n_images", "batch_size"), [(6, 1), (1, 10)])
def test_nothing_to_step_on_is_an_error_rather_than_an_untrained_network(n_images: int, batch_size: int) -> None:
    # Batches of one image are left out, as batch norm needs two.
    with pytest.raises(ValueError, match="batch"):
        train(linear(), blobs(n_images), Recipe(epochs=2, batch_size=batch_size), seed=0)


def test_frozen_parameters_stay_frozen() -> None:
    network = residual()
    network.get_parameter("conv1.weight").requires_grad_(False)
    trained, _ = train(network, blobs(), Recipe(epochs=1, batch_size=20), seed=0)
    assert torch.equal(trained.get_parameter("conv1.weight"), network.get_parameter("conv1.weight"))
    assert not torch.equal(trained.get_parameter("linear.weight"), network.get_parameter("linear.weight"))


def test_a_network_that_is_not_ours_trains_with_its_shared_weight() -> None:
    network = fresh("foreign", n_classes=3)
    trained, _ = train(network, blobs(), Recipe(epochs=1, batch_size=20, learning_rate=0.01), seed=0)
    assert trained.get_submodule("second").weight is trained.get_parameter("first.weight")
    assert not torch.equal(trained.get_parameter("first.weight"), network.get_parameter("first.weight"))
