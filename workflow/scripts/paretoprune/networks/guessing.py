"""Is a dense network better than guessing, and if not, are its labels merely in another order."""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom
from torch import Tensor

from paretoprune.data.splits import LabelledImages

# How seldom guessing may be as good as a network that counts as better.
SIGNIFICANCE = 0.01
# Classes in another order must be right this much more often than the labels as they are, to be worth a line.
WORTH_SAYING = 0.15
# Labelled images to look at, at least, where there are as many.
N_COMPARED = 256
# How many pairs of a permutation are named.
N_PAIRS = 4


@dataclass(frozen=True)
class Comparison:
    """A dense network against the best constant answer.

    Attributes:
        n: Labelled images.
        n_right: How many of them it answers as labelled.
        guess: Share that the best constant answer gets right.
        n_reordered: How many it answers as labelled once the classes are put in another order.
        order: That order in words; empty where none is much better than the labels as they are.
    """

    n: int
    n_right: int
    guess: float
    n_reordered: int = 0
    order: str = ""

    @property
    def accuracy(self) -> float:
        """Share of the images that is answered as labelled."""
        return self.n_right / self.n

    @property
    def is_better(self) -> bool:
        """Whether guessing would hardly be as good; of few images, a network that is mostly right counts."""
        by_chance = float(binom.sf(self.n_right - 1, self.n, self.guess))
        return by_chance <= SIGNIFICANCE or self.accuracy >= (1 + self.guess) / 2 > self.guess

    def check(self) -> None:
        """Refuse a network that guesses, or whose labels are for the most part those of other classes.

        Raises:
            ValueError: It is no better than guessing, or another order of the classes explains more than twice as many
                labels; the message names what may be wrong.
        """
        if self.order and (not self.is_better or 2 * self.n_right < self.n_reordered):
            raise ValueError(
                f"expected labels in the order of the network's classes, found {self.n_right} of {self.n} images "
                f"answered right; {self.order}, {self.n_reordered} would be right: give the labels in the network's "
                "order"
            )
        if not self.is_better:
            raise ValueError(
                f"expected a dense network that is better than guessing, found {self.n_right} of {self.n} labelled "
                f"images answered right, where always the same answer gets {round(self.guess * self.n)}; check that "
                "the images are normalised as in its training, that labels start at 0 and have the order of the "
                "network's classes, and that its trained weights are loaded"
            )

    def report(self, log: logging.Logger, name: str) -> None:
        """Say it in a line; a likely order of the classes is a warning."""
        log.info(
            "%s: right on %.1f %% of %d labelled images, the best constant answer on %.1f %%",
            name,
            100 * self.accuracy,
            self.n,
            100 * self.guess,
        )
        if self.order:
            log.warning(
                "%s: %s, %.1f %% would be right; check the order of the classes",
                name,
                self.order,
                100 * self.n_reordered / self.n,
            )


def images_to_compare(search: LabelledImages, others: LabelledImages) -> LabelledImages:
    """The search images, filled up to `N_COMPARED` with others from all over, as few images prove little."""
    n = min(max(0, N_COMPARED - len(search)), len(others))
    at = torch.linspace(0, len(others) - 1, n).long()
    return LabelledImages(torch.cat([search.images, others.images[at]]), torch.cat([search.labels, others.labels[at]]))


def compare_with_guessing(logits: Tensor, labels: Tensor) -> Comparison:
    """Compare a dense network's answers with the best constant answer, and with its own in another order of classes.

    Args:
        logits: float (n, n_classes); an answer that is not finite counts as wrong.
        labels: int64 (n,), 0 to n_classes - 1.
    """
    n_classes = logits.shape[1]
    finite = logits.isfinite().all(dim=1).cpu()
    answers, wanted = logits.argmax(dim=1).cpu().numpy(), labels.cpu().numpy()
    n, n_right = len(wanted), int(((answers == wanted) & finite.numpy()).sum())
    guess = int(torch.bincount(labels.cpu()).max()) / n
    answers, wanted = answers[finite.numpy()], wanted[finite.numpy()]
    count, order = _best_order(answers, wanted, n_classes)
    plain = Comparison(n, n_right, guess)
    # Right as often as chance allows is no order: the best of many is compared.
    likely = count >= n / 2 and Comparison(n, count, guess).is_better
    return Comparison(n, n_right, guess, count, order) if likely and count - n_right > WORTH_SAYING * n else plain


def _best_order(answers: np.ndarray, labels: np.ndarray, n_classes: int) -> tuple[int, str]:
    """How many labels some order of the classes explains, and its description.

    Args:
        answers: int (n,).
        labels: int (n,).
        n_classes: Numbers in use.
    """
    shifts = np.bincount((labels - answers) % n_classes, minlength=n_classes)
    shift = 1 + int(shifts[1:].argmax()) if n_classes > 1 else 0
    candidates = [(int(shifts[shift]), _shifted(shift, n_classes, labels, answers))] if shift else []
    for first in (0, 1):
        numbers = range(first, first + n_classes)
        as_text = np.array(sorted(numbers, key=str)) - first
        example = ", ".join(str(number) for number in sorted(numbers, key=str)[:3])
        if np.array_equal(as_text, np.arange(n_classes)):
            continue
        candidates.append((int((answers == as_text[labels]).sum()), f"with labels sorted as text ({example})"))
        candidates.append((int((as_text[answers] == labels).sum()), f"with answers sorted as text ({example})"))
    candidates.append(_assigned(answers, labels, n_classes))
    # Of equal ones the first, which is the simplest.
    return max(candidates, key=lambda candidate: candidate[0])


def _shifted(shift: int, n_classes: int, labels: np.ndarray, answers: np.ndarray) -> str:
    """Description of labels that are `shift` higher than the answers, modulo the number of classes."""
    by, word = (shift, "lower") if shift <= n_classes // 2 else (n_classes - shift, "higher")
    said = f"with each label answered {by} {word}"
    differences = labels[(labels - answers) % n_classes == shift] - answers[(labels - answers) % n_classes == shift]
    if len(set(differences.tolist())) > 1:
        return f"{said} (of {n_classes}, going round)"
    return said + (", as if labels started at 1" if by == 1 and word == "lower" else "")


def _assigned(answers: np.ndarray, labels: np.ndarray, n_classes: int) -> tuple[int, str]:
    """The best assignment of answers to labels.

    Each half of the images is measured by the assignment that the other half says: with few images for a class, the
    best of all assignments would explain any answers.
    """
    ranks = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        ranks[labels == label] = np.arange((labels == label).sum())
    halves = [ranks % 2 == 0, ranks % 2 == 1]
    count = 0
    for fitted, evaluated in (halves, halves[::-1]):
        to_answer = _assignment(answers[fitted], labels[fitted], n_classes)
        count += int((to_answer[labels[evaluated]] == answers[evaluated]).sum())
    to_answer = _assignment(answers, labels, n_classes)
    moved = [label for label in np.unique(labels).tolist() if to_answer[label] != label]
    pairs = ", ".join(f"{label} as {to_answer[label]}" for label in moved[:N_PAIRS])
    more = f" and {len(moved) - N_PAIRS} more" if len(moved) > N_PAIRS else ""
    return count, f"with labels answered in another order ({pairs}{more})"


def _assignment(answers: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """The answer for each label, int (n_classes,), each once, that explains most images."""
    confusion = np.zeros((n_classes, n_classes), dtype=np.int64)
    np.add.at(confusion, (labels, answers), 1)
    _, to_answer = linear_sum_assignment(confusion, maximize=True)
    return np.asarray(to_answer)
