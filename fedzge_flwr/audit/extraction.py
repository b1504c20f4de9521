"""What answers on synthetic images tell: of a client's classes, and of its model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedzge_flwr.common.arrays import Float64Array, FloatArray, IntArray
from fedzge_flwr.common.randomness import Purpose, torch_stream
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.learning.distillation import distill
from fedzge_flwr.learning.numerics import select_device
from fedzge_flwr.learning.predict import predict
from fedzge_flwr.learning.tensors import to_numpy, to_tensor
from fedzge_flwr.server.build import build_central
from fedzge_flwr.synthesis.procedural import procedural_images

_STEPS = 600
"""Of an imitation."""


@dataclass(frozen=True)
class Proportions:
    """How well a client's classes are guessed by the mean of its answers' probabilities.

    Parameters
    ----------
    distance, uniform : float
        Total variation between guess and truth, in [0, 1]; that of a uniform guess.
    rank_correlation : float
        Spearman's, in [−1, 1]; 0 if it is not defined.
    """

    distance: float
    uniform: float
    rank_correlation: float


@dataclass(frozen=True)
class Imitation:
    """How alike a model is that was distilled from a client's answers.

    Parameters
    ----------
    answers : int
        So many answers.
    agreement : float
        Share of the pool's images to which both give the same class, in [0, 1].
    """

    answers: int
    agreement: float


def synthetic_images(settings: Settings, num: int) -> FloatArray:
    """Return procedural images (N, C, H, W) in the shared pixel range."""
    stream = torch_stream(settings.run.seed, Purpose.AUDIT)
    return to_numpy(procedural_images(num, settings.data.spec.image_shape, stream))


def class_proportions(logits_NK: FloatArray, labels_M: IntArray) -> Proportions:
    """Compare the mean probabilities of answers (N, K) with the classes of own images (M,)."""
    from scipy.special import softmax
    from scipy.stats import spearmanr

    guess_K = softmax(logits_NK.astype(np.float64), axis=1).mean(axis=0)
    num_classes = logits_NK.shape[1]
    truth_K = np.bincount(labels_M, minlength=num_classes) / len(labels_M)
    even = np.ptp(truth_K) == 0 or np.ptp(guess_K) == 0
    correlation = 0.0 if even else float(spearmanr(guess_K, truth_K).statistic)
    return Proportions(
        _variation(guess_K, truth_K), _variation(1 / num_classes, truth_K), correlation
    )


def imitate(
    settings: Settings,
    images_NCHW: FloatArray,
    logits_NK: FloatArray,
    judged_MCHW: FloatArray,
    classes_M: IntArray,
    sizes: Sequence[int],
    told: Callable[[str], None],
) -> list[Imitation]:
    """Distill a central model of the run from the first answers of some numbers.

    Parameters
    ----------
    settings : Settings
        The run's.
    images_NCHW, logits_NK
        What the client was asked about, and its answers.
    judged_MCHW, classes_M
        Images on which both are compared, and the client's class of each.
    sizes : Sequence[int]
        Numbers of answers.
    told : Callable[[str], None]
        Takes lines of progress.

    Returns
    -------
    list of Imitation
        One for each number.
    """
    device, distillation = select_device(settings.run.server_device), settings.distillation
    found = []
    for size in sizes:
        model = build_central(settings).to(device)
        distill(
            model,
            to_tensor(images_NCHW[:size], device),
            to_tensor(logits_NK[:size], device),
            steps=_STEPS,
            batch_size=distillation.distill_batch_size,
            temperature=distillation.temperature,
            lr=distillation.central_lr,
            settings=settings.optimizer,
            stream=torch_stream(settings.run.seed, Purpose.AUDIT, round_=size),
            class_balance=distillation.class_balance,
        )
        logits_MK = predict(model, to_tensor(judged_MCHW), settings.queries.query_batch_size)
        agreement = float((to_numpy(logits_MK).argmax(axis=1) == classes_M).mean())
        found.append(Imitation(size, agreement))
        told(f"imitation by {size:,} answers: agreement {100 * agreement:.1f} %")
    return found


def _variation(one_K: Float64Array | float, other_K: Float64Array) -> float:
    """Return the total variation between two distributions, in [0, 1]."""
    return float(np.abs(one_K - other_K).sum() / 2)
