"""Mixtures of images."""

import pytest
import torch
from paretoprune.data.mixing import SHARES, mixed


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_each_mixture_is_led_by_its_own_image_and_holds_one_other() -> None:
    made = mixed(torch.eye(40), generator())  # entry j is the share of image j
    leading = made.diagonal()
    alone = leading > 1 - 1e-6  # paired with itself
    assert ((leading >= SHARES[0]) & (leading <= SHARES[1]) | alone).all()
    assert torch.allclose(made.sum(dim=1), torch.ones(40))
    assert ((made > 0).sum(dim=1)[~alone] == 2).all()
    assert not alone.all()


@pytest.mark.parametrize("shape", [(6, 3, 4, 4), (6, 2, 7), (6, 5), (1, 3, 2, 2)])
def test_shapes_stay_and_equal_generators_give_equal_mixtures(shape: tuple[int, ...]) -> None:
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = mixed(images, generator())
    assert made.shape == images.shape
    assert made.dtype == images.dtype
    assert torch.equal(made, mixed(images, generator()))


def test_shares_are_what_was_asked_for() -> None:
    images = torch.randn(50, 3)
    assert torch.allclose(mixed(images, generator(), (1.0, 1.0)), images)
    assert not torch.allclose(mixed(images, generator(), (0.5, 0.5)), images)
