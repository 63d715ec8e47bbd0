"""What steps that search read and show: scores, and progress."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.architectures import Architecture
from paretoprune.tensors import save_tensors
from paretoprune.workflow.search_inputs import log_progress, read_scores

NETWORK = Architecture("resnet8", 10, 1, {"base_width": 2}).build(0).eval()


def test_scores_are_read_by_the_names_of_their_files(tmp_path: Path) -> None:
    network = NETWORK
    layout = WeightUnits.of(network)
    tensors = {name: network.get_parameter(name).detach().abs() for name in layout.names}
    files = [str(tmp_path / f"{name}.safetensors") for name in ("magnitude", "twice")]
    save_tensors(files[0], tensors)
    save_tensors(files[1], {name: 2 * tensor for name, tensor in tensors.items()})
    scores = read_scores(files, layout)
    assert list(scores) == ["magnitude", "twice"]
    assert np.array_equal(scores["magnitude"], torch.cat([tensors[name].flatten() for name in layout.names]).numpy())
    assert np.array_equal(scores["twice"], 2 * scores["magnitude"])


def test_scores_of_another_network_are_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "magnitude.safetensors", {"conv1.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"expected 'conv1\.weight' of shape .*was it made for another network"):
        read_scores([str(tmp_path / "magnitude.safetensors")], WeightUnits.of(NETWORK))


@pytest.mark.parametrize("step_size", [1, 7, 40])
def test_progress_is_about_ten_lines_and_tells_the_end(step_size: int, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("tests.search_inputs")
    caplog.set_level(logging.INFO, log.name)
    show = log_progress(log, 400)
    for evaluations in [*range(step_size, 400, step_size), 400]:
        show({"stage": "phase1", "evaluations": evaluations, "hypervolume": 0.5, "seconds": 1.0})
    assert 8 <= len(caplog.messages) <= 12
    assert caplog.messages[-1] == "phase1: 400 of 400 evaluations, hypervolume 0.5000, 1 s"
