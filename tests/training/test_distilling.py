"""Distillation: that it improves damaged networks without labels, keeps the better one, and repeats."""

import copy
import logging
import re
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from paretoprune import Front, telling
from paretoprune import distil as distil_member
from paretoprune.data.mixing import mixed
from paretoprune.evaluation.metrics import divergence, predict
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.architectures import CifarResNet
from paretoprune.shapes import Emptied
from paretoprune.structured.units import ChannelUnits
from paretoprune.training.distilling import DISTILLING_COLUMNS, Distilled, distil, soft_loss, trial_steps
from small_networks import digits, magnitude_mask, numpy_state, states_equal, trained
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

N_STEPS = 60


def images() -> Tensor:
    return digits()[0][:600]


def search_images() -> Tensor:
    return digits()[0][1000:1200]


@lru_cache
def _slim() -> nn.Module:
    """Half of the channels of every coupling, cut off without any repair."""
    network = trained("residual")
    units = ChannelUnits.of(network, images()[:1])
    bits = np.concatenate([np.arange(size) < max(1, size // 2) for size in units.sizes])
    return units.slim(network, bits).eval()


def slim() -> nn.Module:
    return copy.deepcopy(_slim())


def run(network: nn.Module | None = None, **changed: Any) -> Distilled:
    given: dict[str, Any] = {"search_images": search_images(), "seed": 3, "rates": [0.003], "n_steps": N_STEPS}
    if "budget_seconds" in changed:
        del given["n_steps"]
    dense = changed.pop("dense", None)
    return distil(slim() if network is None else network, dense or trained("residual"), images(), **(given | changed))


def divergence_of(network: nn.Module, at: Tensor) -> float:
    dense = functional.log_softmax(predict(trained("residual"), at, 64).double(), dim=1)
    return divergence(predict(network, at, 64), dense)


def test_a_damaged_network_answers_more_like_the_dense_one_on_images_it_has_not_seen() -> None:
    result = run()
    assert result.is_trained
    held_out = digits()[0][1300:]
    assert divergence_of(result.network, held_out) < 0.7 * divergence_of(slim(), held_out)


@pytest.mark.parametrize("mix", [True, False])
def test_both_divergences_are_those_of_the_search_images(mix: bool) -> None:
    result = run(mix=mix)
    at = mixed(search_images(), torch.Generator().manual_seed(0)) if mix else search_images()
    assert result.before == pytest.approx(divergence_of(slim(), at), abs=1e-6)
    assert result.after == pytest.approx(divergence_of(result.network, at), abs=1e-6)
    assert result.history[-1]["divergence"] == result.after


def test_images_are_mixed_in_training_unless_that_is_not_wanted() -> None:
    seen: list[torch.Tensor] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = trained("residual")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.detach().clone())
            return self.network(x)

    given = {tuple(image.flatten().tolist()) for image in (*images(), *search_images())}
    for mix, least, most in ((True, 0.0, 0.1), (False, 1.0, 1.0)):
        seen.clear()
        run(dense=Watched(), mix=mix, n_steps=4)
        # An image may be its own partner.
        share = np.mean([tuple(image.flatten().tolist()) in given for batch in seen for image in batch])
        assert least <= share <= most


def test_both_networks_stay_as_they_are() -> None:
    network, dense = slim(), trained("residual").train()
    before, dense_before = copy.deepcopy(network), copy.deepcopy(dense)
    run(network, dense=dense)
    assert states_equal(network, before)
    assert states_equal(dense, dense_before)
    assert dense.training
    assert all(parameter.grad is None for parameter in (*network.parameters(), *dense.parameters()))


def test_where_training_harms_the_network_comes_back_bit_for_bit() -> None:
    result = run(rates=[30.0], n_steps=10)
    assert result.after > result.before
    assert not result.is_trained
    assert states_equal(result.network, slim())


def test_the_dense_network_itself_cannot_be_improved() -> None:
    result = run(trained("residual"), rates=[0.1], n_steps=10)
    assert result.before == 0
    assert states_equal(result.network, trained("residual"))


def test_a_loss_that_is_not_finite_ends_a_run_and_nothing_of_it_is_kept() -> None:
    result = run(rates=[1e30], n_steps=10)
    assert result.after == 1
    assert len(result.history) < 10
    assert states_equal(result.network, slim())


def test_a_rate_that_is_too_large_is_not_chosen() -> None:
    result = run(rates=[30.0, 0.003, 1e30], n_steps=100)
    assert result.rate == 0.003
    assert result.is_trained
    tried = {row["rate"]: row["divergence"] for row in result.history if row["stage"] == "trial" and row["divergence"]}
    assert tried[0.003] == min(tried.values())


def test_trials_count_among_the_steps() -> None:
    ticks: list[tuple[int, int]] = []
    result = run(rates=[0.003, 0.001], n_steps=50, progress=lambda done, n: ticks.append((done, n)))
    assert ticks == [(i + 1, 50) for i in range(50)]
    last = {(row["stage"], row["rate"]): row["n_steps"] for row in result.history}
    assert last == {("trial", 0.003): 5, ("trial", 0.001): 5, ("final", result.rate): 40}
    assert result.n_steps == 50


@pytest.mark.parametrize(("n_steps", "n_rates", "each"), [(100, 1, 0), (100, 3, 10), (100, 10, 5), (4, 3, 1)])
def test_trials_get_a_small_share_of_the_steps(n_steps: int, n_rates: int, each: int) -> None:
    assert trial_steps(n_steps, n_rates) == each


def test_rows_of_the_history_have_the_promised_keys() -> None:
    result = run(rates=[0.003, 0.001], n_steps=40)
    assert all(tuple(row) == DISTILLING_COLUMNS for row in result.history)
    measured = [row["stage"] for row in result.history if row["divergence"] is not None]
    assert measured == ["trial", "trial", "final"]


def test_equal_calls_give_equal_networks_and_another_seed_another() -> None:
    first = run(rates=[0.003, 0.001], crop=1, flip=True)
    again = run(rates=[0.003, 0.001], crop=1, flip=True)
    assert states_equal(first.network, again.network)
    assert first.history == again.history
    assert not states_equal(first.network, run(rates=[0.003, 0.001], crop=1, flip=True, seed=4).network)


def test_a_budget_is_turned_into_steps_that_give_the_same_network_again() -> None:
    first = run(budget_seconds=2.0)
    assert first.n_steps > 1
    assert states_equal(first.network, run(n_steps=first.n_steps).network)


def test_a_budget_is_about_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("paretoprune.training.distilling.time.monotonic", lambda: now[0])
    dense, network = trained("residual"), slim()

    def takes(seconds: float) -> Any:
        def hook(*_: Any) -> None:
            now[0] += seconds

        return hook

    for module, seconds in ((dense, 0.5), (network, 1.0)):
        module.register_forward_pre_hook(takes(seconds))
    result = distil(network, dense, images(), search_images=search_images()[:64], seed=0, budget_seconds=100)
    # Looks: 4 after training, 1 before; 5 timed steps with two answers each; then 1.0 a step and 0.5 an answer.
    assert 90 < now[0] <= 101
    assert result.n_steps > 50


def test_global_random_states_and_modes_stay_as_they_were() -> None:
    torch_before, numpy_before = torch.get_rng_state(), numpy_state()
    with torch.inference_mode():
        result = run()
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert numpy_state() == numpy_before
    assert states_equal(result.network, run().network)
    assert not any(tensor.is_inference() for tensor in result.network.state_dict().values())


def test_a_network_with_whole_branches_gone_trains_too() -> None:
    dense = trained("residual")
    units = ChannelUnits.of(dense, images()[:1])
    gone = next(i for i, coupling in enumerate(units.couplings) if coupling.may_vanish)
    bits = np.ones(units.n_units, dtype=bool)
    bits[units.offsets[gone] : units.offsets[gone + 1]] = False
    network = units.slim(dense, bits).eval()
    assert any(isinstance(module, Emptied) for module in network.modules())
    result = run(network)
    assert result.is_trained
    assert {name: tensor.shape for name, tensor in result.network.state_dict().items()} == {
        name: tensor.shape for name, tensor in network.state_dict().items()
    }


def test_weights_that_are_zero_stay_so() -> None:
    network = trained("foreign")
    layout = WeightUnits.of(network)
    parameters = dict(network.named_parameters())
    mask = magnitude_mask(network, layout, 0.3)
    for name, part in layout.split(mask).items():
        parameters[name].data *= torch.from_numpy(part)
    result = run(network, dense=trained("foreign"))
    assert result.is_trained
    kept = dict(result.network.named_parameters())
    for name, part in layout.split(mask).items():
        assert not kept[name][~torch.from_numpy(part)].any()


def test_batch_norms_keep_their_statistics_and_dropout_draws_nothing() -> None:
    network = nn.Sequential(slim(), nn.Dropout(0.5)).eval()
    result = run(network)
    before = dict(network.named_buffers())
    assert before
    assert all(torch.equal(before[name], buffer) for name, buffer in result.network.named_buffers())
    assert result.after == pytest.approx(run().after, abs=1e-9)


def test_a_network_whose_gradients_are_off_is_trained_and_comes_back_so() -> None:
    network = slim().requires_grad_(False)
    result = run(network)
    assert result.is_trained
    assert not any(parameter.requires_grad for parameter in result.network.parameters())


def test_the_loss_is_the_divergence_of_softened_answers() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    p, q = (functional.softmax(values / 2, dim=1) for values in (target, logits))
    expected = 4 * (p * (p / q).log()).sum(dim=1).mean()
    torch.testing.assert_close(soft_loss(logits, target, 2.0), expected)


def test_the_dense_network_answers_once_to_each_batch_of_all_trials() -> None:
    dense, calls = trained("residual"), [0]
    dense.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    run(dense=dense, rates=[0.003, 0.001], n_steps=50, search_images=search_images()[:64])
    assert calls == [1 + 40]


def test_progress_is_said_and_which_network_is_kept(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telling, "TELLS_EVERY", 0.0)
    with caplog.at_level(logging.INFO, "paretoprune"):
        run(rates=[0.003, 30.0], n_steps=20)
        run(rates=[30.0], n_steps=5)
    told = caplog.text
    assert re.search(r"step 1 of 20 \(trial at rate 0\.003\), loss [\d.]+, about \d+ s left", told)
    assert "step 20 of 20 (rate 0.003)" in told
    assert "the network is kept as it was trained" in told
    assert "the network is kept as it was given" in told


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rates": []}, "expected `rates` above 0, at least one, found"),
        ({"rates": [0.1, -1.0]}, "expected `rates` above 0"),
        ({"n_steps": None}, "expected one of `n_steps` and `budget_seconds`, found None and None"),
        ({"n_steps": 5, "budget_seconds": 5.0}, "expected one of `n_steps` and `budget_seconds`"),
        ({"n_steps": 0}, "expected at least 1 steps"),
        ({"n_steps": 2, "rates": [0.1, 0.2]}, "expected at least 3 steps to try 2 rates"),
        ({"budget_seconds": -1.0}, "expected `budget_seconds` above 0"),
        ({"budget_seconds": 1e-9}, r"expected a budget of at least \d+ seconds for 1 steps"),
        ({"batch_size": 0}, "expected a `batch_size` of at least 1"),
        ({"search_images": torch.zeros(0, 1, 8, 8)}, "found 600 images and 0 search images"),
    ],
)
def test_bad_input_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**changed)


def test_a_network_of_other_answers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected logits of shape \(200, 10\) .* found \(200, 7\)"):
        run(CifarResNet(8, 7, 1, base_width=6).eval())


def test_rows_of_a_table_are_neither_cropped_nor_mirrored() -> None:
    network = nn.Sequential(nn.Linear(6, 3)).eval()
    with pytest.raises(ValueError, match="expected images to shift or mirror, found rows of a table"):
        distil(network, network, torch.randn(20, 6), search_images=torch.randn(9, 6), seed=0, n_steps=9, flip=True)


# ------------------------------------------------------------------------------------------------ members of a front


def front(dense: nn.Module | None = None, network: nn.Module | None = None) -> Front:
    """A front of one member, by default a slim one."""
    dense, network = dense or trained("residual"), network or slim()
    masks = PackedMasks.pack(np.ones((1, 8), dtype=bool))
    return Front(masks, np.array([[0.5, 0.4]]), ["phase2"], ("divergence", "macs"), dense, [network.state_dict()])


def member(given: Front | None = None, data: Any = None, **changed: Any) -> nn.Module:
    options: dict[str, Any] = {"n_steps": N_STEPS, "rates": [0.003], "seed": 3, "device": "cpu", "progress": False}
    if changed.pop("holds_out", False) is False:
        options["search_images"] = search_images()
    return distil_member(given or front(), 0, images() if data is None else data, **(options | changed))


def test_a_member_of_a_front_is_distilled_as_its_network_would_be() -> None:
    given = front()
    assert states_equal(member(given), run().network)
    assert states_equal(given.network(0), slim())


def test_images_of_a_member_come_with_labels_or_without() -> None:
    expected = member()
    labels = digits()[1][:600]
    for data in (
        images().numpy(),
        DataLoader(TensorDataset(images()), batch_size=50),
        DataLoader(TensorDataset(images(), labels), batch_size=50),
        TensorDataset(images(), labels),
        [{"pixel_values": images()[:300]}, {"pixel_values": images()[300:]}].__iter__(),
        DataLoader(images(), batch_size=70),  # type: ignore[arg-type]
    ):
        assert states_equal(member(data=data), expected)


def test_labels_of_a_member_s_images_are_not_looked_at() -> None:
    wrong = torch.full((600,), 99.5)
    assert states_equal(member(data=DataLoader(TensorDataset(images(), wrong), batch_size=50)), member())


def test_without_search_images_a_fifth_of_the_images_is_held_out(caplog: pytest.LogCaptureFixture) -> None:
    network = member(holds_out=True)
    assert not states_equal(network, slim())
    assert states_equal(network, member(holds_out=True))
    assert divergence_of(network, digits()[0][1300:]) < divergence_of(slim(), digits()[0][1300:])


def test_a_member_that_training_harms_is_returned_as_it_was() -> None:
    assert states_equal(member(rates=[30.0], n_steps=5), slim())


class Answers(nn.Module):
    """Answers with several parts, and writes into its images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x.mul_(0.5)
        return {"logits": self.network(x * 2)}


def test_a_member_may_answer_in_parts_and_write_into_its_images() -> None:
    given, data = images(), images().clone()
    found = member(front(Answers(trained("residual")).eval(), Answers(slim())), given)
    assert torch.equal(given, data)
    assert not found._forward_hooks
    assert not found._forward_pre_hooks
    assert divergence_of(found.network, search_images()) < 0.7 * divergence_of(slim(), search_images())  # type: ignore[arg-type]


def test_a_bar_shows_the_steps_and_what_came_out(capfd: pytest.CaptureFixture[str]) -> None:
    member(progress=True, n_steps=7)
    told = capfd.readouterr().err
    assert "7/7" in told
    assert re.search(r"divergence 0\.\d+ before, 0\.\d+ after, kept (trained|unchanged)", told)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_steps": 0}, "expected `n_steps` as a whole number of at least 1, found 0"),
        ({"crop": -1}, "expected `crop` as a whole number"),
        ({"flip": "yes"}, "expected `flip` as True or False"),
        ({"device": "nowhere"}, "expected `device`"),
        ({"data": torch.zeros(0, 1, 8, 8)}, "expected at least one image in images, found none"),
        ({"data": images() / 0}, "expected finite images"),
        ({"data": [{"picture": images()}].__iter__()}, "with images under one of .* found the keys picture"),
    ],
)
def test_bad_input_for_a_member_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        member(**changed)


def test_a_member_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="expected `index` as a whole number from -1 to 0, found 3"):
        distil_member(front(), 3, images(), n_steps=5, progress=False)


def test_a_front_without_networks_is_refused() -> None:
    bare = Front(PackedMasks.pack(np.ones((1, 8), dtype=bool)), np.array([[0.5, 0.4]]), ["phase2"])
    with pytest.raises(RuntimeError, match="knows no network"):
        member(bare)
