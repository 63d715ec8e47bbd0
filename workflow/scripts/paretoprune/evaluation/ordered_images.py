"""The images that candidates are evaluated on, hardest first, with what the dense network answers."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from paretoprune.devices import repeatable
from paretoprune.evaluation.compute import Computation, answers, magnitude_mask, place
from paretoprune.evaluation.metrics import image_losses, top1_error
from paretoprune.evaluation.task import Task
from paretoprune.networks.architectures import channels_last


@dataclass(frozen=True)
class OrderedImages:
    """Images in the order in which a bad candidate's loss grows soonest.

    Attributes:
        images: (n, c, h, w), on the device and in the type to compute in.
        labels: int64 (n,), on the device.
        dense_log_probabilities: float64 (n, n_classes), log-softmax of the dense network's logits.
        dense_error: The dense network's top-1 error on them.
    """

    images: Tensor
    labels: Tensor
    dense_log_probabilities: Tensor
    dense_error: float


def hardest_first(
    task: Task, computation: Computation, objective: str, device: torch.device, batch_size: int
) -> OrderedImages:
    """Order a task's images by the loss of a magnitude-pruned network, largest first.

    Args:
        task: The images, and the dense network.
        computation: The way to compute that network's answers.
        objective: `error` or `divergence`: the loss.
        device: Where to compute.
        batch_size: Images per forward pass.
    """
    labels = task.labels.to(device)
    with repeatable(), torch.inference_mode():
        images = place(task.images, device, computation.dtype)
        dense = answers(computation.network, images, batch_size, None)
        pruned = answers(computation.network, images, batch_size, magnitude_mask(task.network, task.units))
        if objective == "error":
            # How far the best wrong answer lies above the right one: nearly wrong comes before surely right.
            wrongly = pruned.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
            loss = (wrongly - pruned.gather(1, labels[:, None])[:, 0]).nan_to_num()
        else:
            loss = image_losses(pruned, labels, functional.log_softmax(dense.double(), dim=1))[1]
        order = loss.argsort(descending=True, stable=True)
        # Indexing may lay images out anew.
        images, labels, dense = channels_last(images[order]), labels[order], dense[order]
    return OrderedImages(images, labels, functional.log_softmax(dense.double(), dim=1), top1_error(dense, labels))
