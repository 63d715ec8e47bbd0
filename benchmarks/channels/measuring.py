"""Test accuracy of choices under each repair."""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from paretoprune.data.splits import LabelledImages
from paretoprune.devices import repeatable
from paretoprune.evaluation.metrics import predict
from paretoprune.networks.architectures import channels_last, to_channels_last
from paretoprune.structured.judging import Judging, SlimJudge
from torch import nn

from benchmarks.channels.choices import Choice
from benchmarks.channels.subject import Subject

REPAIRS = ("none", "reconstruct", "batchnorm")
BATCH_SIZE = 64
_LOGGER = logging.getLogger("benchmarks")

Row = dict[str, Any]


def measure(subject: Subject, choices: Sequence[Choice], repairs: Sequence[str] = REPAIRS) -> Iterator[Row]:
    """Test every choice after every repair with all calibration images."""
    for repair in repairs:
        judge = SlimJudge(subject.task, Judging(repair))
        for choice in choices:
            yield row(subject, choice, repair, judge.build(choice.bits))


def row(subject: Subject, choice: Choice, repair: str, network: nn.Module) -> Row:
    """What is written of a choice and its finished network."""
    found = {
        "tool": choice.tool,
        "importance": choice.importance,
        "allocation": choice.allocation,
        "tried": choice.tried,
        "repair": repair,
        "level": choice.level,
        "removed": round(subject.removed(choice.bits), 5),
        "ratio": choice.ratio,
        **accuracy(network, subject.test),
    }
    _LOGGER.info("%s", " ".join(f"{key}={value}" for key, value in found.items() if key != "wrong"))
    return found


def accuracy(network: nn.Module, test: LabelledImages) -> Row:
    """Top-1 accuracy, its standard error, and which images are wrong (hexadecimal, the first image first).

    The layout of the network's weights changes, in place.
    """
    with repeatable():
        logits = predict(to_channels_last(network), channels_last(test.images), BATCH_SIZE)
    right = ((logits.argmax(dim=1) == test.labels) & logits.isfinite().all(dim=1)).numpy()
    share = float(right.mean())
    return {
        "accuracy": share,
        "standard_error": math.sqrt(share * (1 - share) / len(right)),
        "wrong": np.packbits(~right).tobytes().hex(),
    }


def difference(row: Row, other: Row, n_images: int) -> tuple[float, float]:
    """How much more accurate one row's network is than another's on the same images, and the standard error of that."""
    wrong, other_wrong = (
        np.unpackbits(np.frombuffer(bytes.fromhex(one["wrong"]), dtype=np.uint8))[:n_images].astype(int)
        for one in (row, other)
    )
    each = other_wrong - wrong
    return float(each.mean()), float(each.std(ddof=1) / math.sqrt(n_images))
