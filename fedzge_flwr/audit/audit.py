"""An audit: the client's model and its shadows are trained, attacked, and what came out is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fedzge_flwr.audit.extraction import (
    Imitation,
    Proportions,
    class_proportions,
    imitate,
    synthetic_images,
)
from fedzge_flwr.audit.findings import Attack, Findings, write_exposed
from fedzge_flwr.audit.membership import margins, mean_where, offline_lira, online_lira, rmia
from fedzge_flwr.audit.page import write_page
from fedzge_flwr.audit.pool import Pool, halves, pool_of
from fedzge_flwr.audit.subjects import Endpoint, Subject
from fedzge_flwr.audit.training import train_all
from fedzge_flwr.black_boxes.partition import TorchBlackBox
from fedzge_flwr.common.arrays import BoolArray, Float64Array, FloatArray
from fedzge_flwr.common.errors import AuditError
from fedzge_flwr.common.randomness import Purpose, numpy_stream
from fedzge_flwr.config.node import NodeSettings, from_node_config
from fedzge_flwr.config.owner import owner_settings
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.data.loading import load_split
from fedzge_flwr.images.image_set import ImageSet
from fedzge_flwr.learning.predict import predict
from fedzge_flwr.learning.tensors import to_numpy, to_tensor

_FEW_IMAGES = 45
"""A class of fewer images is told apart: its images are the most exposed."""

_IMITATIONS = (250, 1000, 4000)
"""Answers that a model is distilled from."""


@dataclass(frozen=True)
class Audited:
    """What is audited, and how.

    Parameters
    ----------
    settings : Settings
        The run's.
    client : int
        Its partition.
    shadows : int
        Shadow models: an even number, at least 2.
    outside : ImageSet, optional
        Images that the client does not have (`fedzge_flwr.audit.pool.pool_of`).
    node_config : Mapping[str, object]
        The owner's keys.
    central : nn.Module, optional
        The run's central model, to be attacked too.
    """

    settings: Settings
    client: int
    shadows: int = 8
    outside: ImageSet | None = None
    node_config: Mapping[str, object] = field(default_factory=dict)
    central: nn.Module | None = None

    def __post_init__(self) -> None:
        clients = self.settings.run.num_clients
        if not 0 <= self.client < clients:
            raise AuditError(f"--client {self.client}: the run's clients are 0 to {clients - 1}")
        if self.shadows < 2 or self.shadows % 2:
            raise AuditError(f"--shadows {self.shadows}: give an even number, at least 2")

    @property
    def node(self) -> NodeSettings:
        """The owner's keys that say what the client is made of; ConfigError if one is wrong."""
        return from_node_config({"partition-id": self.client, **self.node_config}, self.settings)


def audit(asked: Audited, folder: Path, told: Callable[[str], None] = print) -> Findings:
    """Audit a client; go on from the models that an earlier call has kept in the folder.

    Parameters
    ----------
    asked : Audited
        What is audited.
    folder : Path
        Takes ``audit.json``, ``audit.html``, ``exposed.csv`` and ``models/``: for the owner alone.
    told : Callable[[str], None]
        Takes lines of progress.

    Raises
    ------
    FedZGEError
        If a setting is wrong, data are missing or too few, or a file cannot be written.
    """
    settings, client = asked.settings, asked.client
    run = settings.run
    own = _own(settings, client, asked.node.data_path)
    stream = numpy_stream(run.seed, Purpose.AUDIT, partition=client)
    pool = pool_of(own, asked.outside, stream)
    in_SN = halves(pool.images.labels_N, asked.shadows, stream)
    subject, *shadows = _models(asked, pool, in_SN, folder / "models", told)
    endpoint = Endpoint(subject, asked.node_config)
    answers_NK = endpoint.logits(pool.images.inputs_NCHW)
    target_N = margins(answers_NK, pool.images.labels_N)
    shadows_SN = np.stack([_margins(shadow, pool) for shadow in shadows])
    attacks, scores_N = _attacks(pool, target_N, shadows_SN, in_SN)
    proportions, imitation = _extracted(settings, endpoint, pool, answers_NK, told)
    lots_N = stream.permutation(pool.member_N)
    findings = Findings(
        about=_about(asked, pool),
        attacks=attacks,
        control=Attack.of("membership by lot", scores_N, lots_N),
        proportions=proportions,
        imitation=imitation,
        central=None if asked.central is None else _of_central(settings, asked.central),
    )
    findings.write(folder)
    write_exposed(folder, pool.images.labels_N, scores_N, pool.member_N)
    write_page(folder / "audit.html", findings)
    return findings


def _own(settings: Settings, client: int, data_path: str | None = None) -> ImageSet:
    """Return the images that a client of the run trains on."""
    num_clients = settings.run.num_clients
    own = TorchBlackBox(settings, client, num_clients, data_path=data_path).trained_on()
    assert own is not None
    return own


def _models(
    asked: Audited, pool: Pool, in_SN: BoolArray, folder: Path, told: Callable[[str], None]
) -> list[TorchBlackBox]:
    """Return the client's model, and those of its shadows."""
    images = [pool.members, *(pool.images.take(np.flatnonzero(in_N)) for in_N in in_SN)]
    most = owner_settings(asked.node_config, {}).max_trainings
    subjects = [
        Subject(asked.settings, asked.client, of_model, number, asked.node, most)
        for number, of_model in enumerate(images)
    ]
    return train_all(subjects, folder, told)


def _margins(model: TorchBlackBox, pool: Pool) -> Float64Array:
    return margins(model.logits(pool.images.inputs_NCHW), pool.images.labels_N)


def _extracted(
    settings: Settings,
    endpoint: Endpoint,
    pool: Pool,
    answers_NK: FloatArray,
    told: Callable[[str], None],
) -> tuple[Proportions, list[Imitation]]:
    """Ask about synthetic images; return what the answers tell of classes and model."""
    asked_NCHW = synthetic_images(settings, _IMITATIONS[-1])
    logits_NK = endpoint.logits(asked_NCHW)
    imitation = imitate(
        settings,
        asked_NCHW,
        logits_NK,
        pool.images.inputs_NCHW,
        answers_NK.argmax(axis=1),
        _IMITATIONS,
        told,
    )
    return class_proportions(logits_NK, pool.members.labels_N), imitation


def _attacks(
    pool: Pool, target_N: Float64Array, shadows_SN: Float64Array, in_SN: BoolArray
) -> tuple[list[Attack], Float64Array]:
    """Return the attacks, and the scores (N,) of the first."""
    scores = {
        "LiRA, online": online_lira(target_N, shadows_SN, in_SN),
        "LiRA, offline": offline_lira(target_N, shadows_SN, in_SN),
        "RMIA": rmia(target_N, shadows_SN, in_SN),
        "margin alone": target_N,
    }
    groups = _groups(pool, shadows_SN, in_SN)
    found = [Attack.of(name, scores_N, pool.member_N, groups) for name, scores_N in scores.items()]
    return found, next(iter(scores.values()))


def _groups(pool: Pool, shadows_SN: Float64Array, in_SN: BoolArray) -> dict[str, BoolArray]:
    """Return the images by size of their class, and by how hard models without them find them."""
    labels_N = pool.images.labels_N
    sizes_K = np.bincount(pool.members.labels_N, minlength=int(labels_N.max()) + 1)
    few_N = sizes_K[labels_N] < _FEW_IMAGES
    ease_N = mean_where(shadows_SN, ~in_SN)
    low, high = np.quantile(ease_N, [0.25, 0.75])
    return {
        f"classes of fewer than {_FEW_IMAGES} images": few_N,
        f"classes of {_FEW_IMAGES} images or more": ~few_N,
        "the hardest quarter": ease_N <= low,
        "the easiest quarter": ease_N >= high,
    }


def _of_central(settings: Settings, central: nn.Module) -> Attack:
    """Attack the central model by its margins: all clients' images against the test set's."""
    own = [_own(settings, client) for client in range(settings.run.num_clients)]
    test = load_split(settings.data, "test")
    found = []
    for images in (*own, test):
        logits = predict(central, to_tensor(images.images_NCHW), settings.queries.query_batch_size)
        found.append(margins(to_numpy(logits), images.labels_N))
    scores_N = np.concatenate(found)
    member_N = np.arange(len(scores_N)) < len(scores_N) - len(test)
    return Attack.of("central model, margin", scores_N, member_N)


def _about(asked: Audited, pool: Pool) -> dict[str, Any]:
    members = int(pool.member_N.sum())
    return {
        "client": asked.client,
        "dataset": asked.settings.data.dataset,
        "members": members,
        "others": len(pool.images) - members,
        "outside": asked.outside is not None,
        "shadows": asked.shadows,
        "node_config": dict(asked.node_config),
    }
