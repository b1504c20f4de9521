"""What a round asks, is answered and learns, and how its phases are run.

A recipe is a function that runs the phases of a round in order (`fedzge_flwr.server.efficient`,
`fedzge_flwr.server.paper`). A phase takes what it needs and returns what it makes; the recipe notes
that in the round's state, for whoever follows the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.learning.losses import LossTerms
from fedzge_flwr.query.question import Question
from fedzge_flwr.server.clients import ClientAccuracy, ClientAnswer, Clients
from fedzge_flwr.server.state import ServerState

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class SyntheticBatch:
    """The images generated in a round.

    Parameters
    ----------
    z_ND, y_N : Tensor
        Noise and labels.
    x_NCHW : Tensor
        The images, with the generator's graph behind them.
    """

    z_ND: Tensor
    y_N: Tensor
    x_NCHW: Tensor


@dataclass(frozen=True)
class Generated:
    """Generated images, and the question about them alone, as the estimator chose it."""

    batch: SyntheticBatch
    question: Question


@dataclass(frozen=True)
class Asked:
    """What a round asks.

    Parameters
    ----------
    question : Question
        All that the clients are asked: the generated images first, in copies, then the others.
    generated : Generated, optional
        The part of it that is about generated images; None if there are none.
    codes_ED : Tensor
        Codes of the patterns, the images that follow the generated ones.
    counts : Mapping[str, int]
        How many of the images that are not generated are of which source, in their order.
    """

    question: Question
    generated: Generated | None = None
    codes_ED: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_generated(self) -> int:
        """How many of the base images are generated: the first."""
        return len(self.generated.batch.z_ND) if self.generated is not None else 0


@dataclass(frozen=True)
class Answered:
    """What the clients' answers combine to.

    Parameters
    ----------
    participants : tuple of int
        The partitions whose answers made the ensemble, in order.
    logits_NK : ndarray of float32
        The ensemble's logits on the base images, softened: what the central model distills.
    peer_logits_NK : ndarray of float32, optional
        The ensemble's logits as they are: what clients distill, in rounds in which they do.
    generated_logits_BNK : ndarray of float32, optional
        The ensemble's logits on all copies of the generated images.
    unmoved : tuple of int
        Participants whose answers were the same on all copies of all generated images: left out of
        ``generated_logits_BNK``, unless all are.
    probabilities : tuple of int
        Participants whose answers are probabilities, where logits were wanted.
    """

    participants: tuple[int, ...]
    logits_NK: FloatArray
    peer_logits_NK: FloatArray | None
    generated_logits_BNK: FloatArray | None = None
    unmoved: tuple[int, ...] = ()
    probabilities: tuple[int, ...] = ()

    @property
    def moving(self) -> bool:
        """Whether any participant's answers tell of the gradient."""
        return set(self.unmoved) != set(self.participants)


@dataclass(frozen=True)
class GeneratorStep:
    """The zeroth-order step: the objective's terms before it, and the norm of ∂L/∂x."""

    terms: LossTerms
    gradient_norm: float


@dataclass(frozen=True)
class Learned:
    """What the server learned: its generator's step, if it took one, and its last losses."""

    step: GeneratorStep | None
    central_distill_loss: float


@dataclass(frozen=True)
class Evaluated:
    """Accuracies of all clients by partition, and the ensemble's logits on the test set."""

    accuracies: Mapping[int, ClientAccuracy] = field(default_factory=dict)
    ensemble_logits_MK: FloatArray | None = None


@dataclass
class RoundState:
    """One round as far as it has come.

    Parameters
    ----------
    round : int
        From 1.
    on_phase : Callable[[int, str], None]
        Called with round and name before each phase.
    sampled : tuple of int
        The sampled clients, in order of partition.
    replies : Mapping[int, ClientAnswer]
        Of those that answered.
    asked, answered, learned : optional
        What was asked, what came of it, and what was learned, each set by one phase.
    distill_losses : dict[int, float]
        Of the clients that distilled in this round's own exchanges.
    evaluated : Evaluated
        What clients and ensemble are worth.
    skipped : str, optional
        Why the round ended early.
    seconds : dict[str, float]
        Wall time by phase.
    """

    round: int
    on_phase: Callable[[int, str], None]
    sampled: tuple[int, ...] = ()
    replies: Mapping[int, ClientAnswer] = field(default_factory=dict)
    asked: Asked | None = None
    answered: Answered | None = None
    learned: Learned | None = None
    distill_losses: dict[int, float] = field(default_factory=dict)
    evaluated: Evaluated = field(default_factory=Evaluated)
    skipped: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def do(self, phase: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a phase: say so before, and note how long it took."""
        self.on_phase(self.round, phase.__name__)
        started = time.perf_counter()
        try:
            return phase(*args, **kwargs)
        finally:
            self.seconds[phase.__name__] = time.perf_counter() - started


class Recipe(NamedTuple):
    """A form of the round.

    Parameters
    ----------
    run : Callable[[ServerState, Clients, RoundState], None]
        Runs the phases in order.
    generator_steps : Callable[[Settings], int]
        Steps that the generator takes in a round: its schedule is over all of them.
    """

    run: Callable[[ServerState, Clients, RoundState], None]
    generator_steps: Callable[[Settings], int]
