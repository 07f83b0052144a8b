"""What each flag means and what to do about it; the words that the report and the documentation print.

The rules are Athalye et al. 2018 (arXiv 1802.00420), Carlini et al. 2019 (arXiv 1902.06705), Tramer et al. 2020 (arXiv
2002.08347) and the automatic checks of AutoAttack (Croce and Hein 2020, arXiv 2003.01690), with thresholds of our own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Flag(NamedTuple):
    """``meaning``: what was observed; ``todo``: what to do; ``fatal``: the row prints "unreliable", not a number."""

    meaning: str
    todo: str
    fatal: bool = False


FLAGS: dict[str, Flag] = {
    "zero-grad": Flag(
        "The attacker had no usable gradient: it was entirely zero for more than 1% of the images at some step, or "
        "zero in more than half of the pixels on average.",
        "Attack through a surrogate (BPDA) of the step that blocks the gradient; check for rounding, sorting, sign, "
        "saturated softmax or a detached tensor.",
        fatal=True,
    ),
    "no-gradient": Flag(
        "A white-box member could not differentiate the defense at all: the pixels leave autograd, or its output does "
        "not depend on them. That member changed nothing; surrogates, transfer and black-box members decided.",
        "Offer a surrogate (BPDA) for the step that cannot be differentiated. Without one R* says little about an "
        "attacker who writes one.",
    ),
    "constant": Flag(
        "All images get the same highest logit and the same class: the model or the defense ignores its input.",
        "Check weights, preprocessing and prompts; no robustness figure of a constant means anything.",
    ),
    "not-converged": Flag(
        "The loss was still rising when the attack stopped: the last tenth of the steps gave more than 1% of the gain, "
        "or four times the steps lower the accuracy by more than a point.",
        "Run with more steps until accuracy stops falling; until then the figure is an upper bound.",
    ),
    "steps-hurt": Flag(
        "More steps or restarts raised the accuracy by more than chance allows; an attack that keeps its best iterate "
        "cannot do that.",
        "Look for randomness shared between runs, a defense with memory, or an attack that keeps its last iterate.",
        fatal=True,
    ),
    "eps-sweep": Flag(
        "Accuracy rises somewhere as the budget grows, or stays above half of chance level at 64/255, where any image "
        "can be made into another.",
        "Suspect masked gradients: add members to the adaptive composition before believing the figure.",
    ),
    "bb-beats-wb": Flag(
        "Transferred or black-box examples broke images that no white-box attack could break (more than 0.2 points of "
        "the accuracy).",
        "The white-box attack is too weak for this defense: give it a better surrogate, loss or more steps.",
        fatal=True,
    ),
    "random-beats": Flag(
        "Random points in the ball fooled the defense on an image that the gradient attack could not break.",
        "The gradient is useless there; attack through a surrogate, or average more draws if the defense is random.",
    ),
    "start-spread": Flag(
        "Success depends on the random start: over 5 starts it varies (standard deviation above 0.1) on more than 5% "
        "of the images.",
        "Use more restarts; one start overstates robustness.",
    ),
    "stochastic": Flag(
        "Repeated passes over the same image differ in their logits, or change the label.",
        "Nothing if the defense is random by design: the attack averages over draws and the verdict uses fresh ones. "
        "Otherwise look for dropout or batch statistics that were left on.",
    ),
    "dynamic": Flag(
        "The defense optimises, or calls autograd, while it predicts.",
        "Check that the adaptive composition unrolls this inner optimisation or replaces it by a surrogate.",
    ),
    "probabilities": Flag(
        "The outputs sum to one; attacks expect logits, and a softmax flattens their loss.",
        "Return logits, or the logarithm of the probabilities.",
    ),
    "tie": Flag(
        "Two classes share an embedding (cosine above 1 - 1e-6), or the two highest logits are equal within 1e-6.",
        "Rename or merge the classes; until then the lowest index wins, and the number of tied images is printed.",
    ),
    "dtype": Flag(
        "Half precision was used for the gradient, and the check in fp32 changed more than 0.1% of the labels.",
        "Run with --precision fp32.",
    ),
    "budget": Flag(
        "An adversarial image lies outside the ball or outside [0, 1] by more than 1e-6.",
        "The attack has a bug: it projects wrongly or rounds afterwards. The figure is not comparable.",
        fatal=True,
    ),
}

FATAL: frozenset[str] = frozenset(name for name, flag in FLAGS.items() if flag.fatal)


def explain(raised: Iterable[str]) -> list[tuple[str, Flag]]:
    """The flags that were raised, in the order of `FLAGS`; a name that is not listed says so instead of vanishing."""
    names = set(raised)
    unknown = Flag("Raised by a version that knows more flags than this one.", "Upgrade ironclip to read about it.")
    return [(n, f) for n, f in FLAGS.items() if n in names] + [(n, unknown) for n in sorted(names - FLAGS.keys())]
