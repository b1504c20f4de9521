"""The queries of FedZGE's run, and its gradient steps, of which every method has as many."""

from __future__ import annotations

from dataclasses import dataclass

from fedzge_flwr.config.sections import Settings
from fedzge_flwr.learning.training import local_epochs, steps_an_epoch
from fedzge_flwr.query.copies import copies_asked, num_queries
from fedzge_flwr.synthesis.composition import image_counts


def queries_of_round(settings: Settings) -> int:
    """Return the queries of each client in a round of FedZGE, perturbed images among them."""
    images, queries = settings.images, settings.queries
    copies = copies_asked(queries.estimator, queries.q, queries.differences)
    num_images = images.synthetic_batch_size
    of_paper = settings.run.recipe == "paper"
    generated = num_images if of_paper else image_counts(images).generated
    return num_queries(num_images, generated, copies)


def training_rounds(settings: Settings) -> int:
    """Return the rounds in which a client that takes part in all trains on its own images."""
    rounds = settings.run.num_server_rounds
    return min(settings.training.local_rounds or rounds, rounds)


@dataclass(frozen=True)
class Plan:
    """The gradient steps of one client in a run of FedZGE with the same settings.

    Parameters
    ----------
    num_examples : int
        The client's own images.
    rounds : int
        Rounds of the run.
    steps_an_epoch : int
        Batches of the client's own images.
    training, distilling : int
        Its steps of local training and of distillation, in the whole run.
    """

    num_examples: int
    rounds: int
    steps_an_epoch: int
    training: int
    distilling: int

    @classmethod
    def of(cls, settings: Settings, num_examples: int) -> Plan:
        """Return the plan of a client with so many images, by the settings of FedZGE."""
        run, training, distillation = settings.run, settings.training, settings.distillation
        rounds = run.num_server_rounds
        an_epoch = steps_an_epoch(num_examples, training.batch_size)
        distill_rounds = min(distillation.client_distill_rounds or rounds, rounds)
        return cls(
            num_examples,
            rounds,
            an_epoch,
            training_rounds(settings) * local_epochs(num_examples, training) * an_epoch,
            distill_rounds * distillation.client_distill_steps,
        )

    @property
    def total(self) -> int:
        """All steps of the client."""
        return self.training + self.distilling

    def epochs(self, steps: float, rounds: int) -> int:
        """Return how many epochs a round come nearest to so many steps in so many rounds; ≥ 1."""
        return max(round(steps / rounds / self.steps_an_epoch), 1)
