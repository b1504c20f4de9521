"""What a client must offer, and nothing of how: the boundary between wire and model.

The endpoints (`fedzge_flwr.client`) speak to a `BlackBox`, and know nothing of the model behind it.
Everything crosses this boundary as NumPy arrays, so that a model of any library fits. Images are
float32 (N, C, H, W) in the shared pixel range (`fedzge_flwr.images.pixels.PIXEL_RANGE`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from fedzge_flwr.common.arrays import ByteArray, FloatArray

State: TypeAlias = "dict[str, npt.NDArray[np.generic]]"
EvaluationSplit: TypeAlias = Literal["test", "held-out"]


@dataclass(frozen=True)
class ClientProfile:
    """What a client tells of itself.

    Parameters
    ----------
    partition : int
        Its partition, from 0; the name by which the run knows it.
    num_partitions : int
        How many partitions it was told there are.
    num_examples : int
        Size of its training set: its weight in the ensemble.
    device : str
        Where it computes, e.g. ``"cpu"``.
    gpu_share : float
        The share of a GPU that it was given, in [0, 1] for a shared one; 0 without.
    data : str
        What tells its own images from others (`fedzge_flwr.images.image_set.ImageSet.digest`);
        empty: not known. It stays here: the server is told whether they are those of before.
    epsilon, delta : float
        Of its differential privacy, if its owner has the server told; else 0.
    """

    partition: int
    num_partitions: int
    num_examples: int
    device: str
    gpu_share: float
    data: str = ""
    epsilon: float = 0.0
    delta: float = 0.0


@dataclass(frozen=True)
class FitReport:
    """Outcome of local training.

    Parameters
    ----------
    num_examples : int
        Images trained on; 0: too few to train, or a model that does not.
    loss : float
        That of the last epoch, at least 0.
    """

    num_examples: int
    loss: float


@dataclass(frozen=True)
class ClientEvaluation:
    """Outcome of an evaluation.

    Parameters
    ----------
    num_examples : int
        Images evaluated; with 0 the other figures are 0.
    loss : float
        Mean cross-entropy in nats.
    accuracy : float
        In [0, 1].
    logits_NK : ndarray of float32
        Logits on the common test set, in its order; (0, K) for a held-out set, which is private.
    images_NCHW : ndarray of uint8 or of float32, optional
        The images that these logits are of, as levels or as values, so that an owner's noise on
        them is what it is in answers to queries. They stay here.
    """

    num_examples: int
    loss: float
    accuracy: float
    logits_NK: FloatArray
    images_NCHW: ByteArray | FloatArray | None = None


class BlackBox(Protocol):
    """A client's model behind its endpoints."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that it takes."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of logits K."""
        ...

    @property
    def max_query_images(self) -> int:
        """Most images that it answers in one message."""
        ...

    @property
    def local_rounds(self) -> int:
        """Rounds of local training after which the model is left as it is; 0: all rounds."""
        ...

    def profile(self) -> ClientProfile:
        """Say who this client is."""
        ...

    def fit(self, round_: int) -> FitReport:
        """Train the model on the client's own data for one round."""
        ...

    def logits(self, images_NCHW: FloatArray) -> FloatArray:
        """Answer a query: logits (N, K), finite and of magnitude at most 10⁶.

        Each image's are as if it had been asked about alone; the model is unchanged.
        """
        ...

    def distill(
        self,
        round_: int,
        images_NCHW: FloatArray,
        teacher_logits_NK: FloatArray,
        temperature: float,
    ) -> float:
        """Distill the ensemble's logits (N, K) at a temperature T > 0; return the loss, ≥ 0.

        0 says that nothing was learned.
        """
        ...

    def evaluate(self, split: EvaluationSplit) -> ClientEvaluation:
        """Evaluate the model."""
        ...

    def state(self) -> State:
        """Return all that must be kept between messages, as arrays; it never leaves the client."""
        ...

    def load_state(self, state: State) -> None:
        """Take up what `state` returned earlier; the arrays may become the model's own memory.

        Raises
        ------
        ValueError
            If it is not a state of this model.
        """
        ...

    def close(self) -> None:
        """Give back what is held, memory of a GPU above all; called once after each message."""
        ...


@runtime_checkable
class KnowsItsOwn(Protocol):
    """What a `BlackBox` may offer besides, so that a distillation that harms it can be undone.

    One that does not is judged by `BlackBox.evaluate` on its held-out images, if it has any.
    """

    def own_correct(self, most: int) -> npt.NDArray[np.bool_]:
        """Say of each of at most so many of the client's own images whether the model is right.

        The same ones, in the same order, each time. The model is unchanged, and nothing random is
        drawn. Empty without images. `fedzge_flwr.black_boxes.judging` has how a
        `ClassifierBlackBox` does it.
        """
        ...


@runtime_checkable
class LearnsBySettings(Protocol):
    """What a `BlackBox` may offer besides, so that settings of two sides do not differ unseen."""

    def learns_by(self) -> Mapping[str, object]:
        """Return the settings by which it trains and distills, by the run config's keys.

        They stay here: the server is told which differ from its own.
        """
        ...
