"""The repairs by name: what their entries say, and what follows from it."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from evaluators import evaluator
from paretoprune.repair import repairs
from paretoprune.repair.batchnorm import Moments, Recalibration
from paretoprune.repair.registry import REPAIR_REFITS
from paretoprune.repair.repairs import REPAIRS, Repair, make_repair
from small_networks import calibration, some_masks, states_equal, trained

PACKAGE = Path(repairs.__file__).parents[2]


def test_the_registry_names_every_repair_and_whether_it_re_fits() -> None:
    assert {name: repair.refits for name, repair in REPAIRS.items()} == REPAIR_REFITS
    assert list(REPAIRS) == list(REPAIR_REFITS)


@pytest.mark.parametrize("module", ["repair.registry", "importance.registry"])
def test_names_and_needs_are_read_without_torch(module: str) -> None:
    code = f"import sys, paretoprune.{module} as found; print(len(vars(found)) > 0, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"]


def anew(trained: Moments, dense: Moments, pruned: Moments) -> Moments:
    """Statistics as they are on the calibration images."""
    return pruned


def test_a_repair_that_only_recalibrates_by_another_rule_takes_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REPAIRS, "anew", Repair(lambda n, images: Recalibration(n, images, anew), correct=anew))
    network = trained("residual")
    evaluate = evaluator(network, "anew")
    assert evaluate.is_fused
    assert not (evaluate(some_masks(network)) == evaluator(network, "batchnorm")(some_masks(network))).all()
    repaired, x = copy.deepcopy(network), calibration()
    make_repair("anew", network, x)(repaired)
    mean = network.get_submodule("conv1")(x).mean((0, 2, 3))
    torch.testing.assert_close(repaired.get_buffer("bn1.running_mean"), mean, rtol=1e-3, atol=1e-4)


def test_a_repair_that_changes_anything_else_works_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def shift(network: torch.nn.Module) -> None:
        network.get_buffer("bn1.running_mean").add_(1.0)

    monkeypatch.setitem(REPAIRS, "shift", Repair(lambda network, images: shift))
    assert not evaluator(trained("residual"), "shift").is_fused


def test_without_a_repair_nothing_is_changed() -> None:
    network = trained("residual")
    before = copy.deepcopy(network)
    make_repair("none", network, calibration()[:0])(network)
    assert states_equal(network, before)
