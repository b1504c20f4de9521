"""Dividing a data set among clients, with flwr-datasets' partitioners on in-memory labels."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fedzge_flwr.common.errors import DataError
from fedzge_flwr.common.randomness import Purpose, derive_seed, numpy_stream
from fedzge_flwr.config.sections import DataSettings
from fedzge_flwr.data.loading import load_split
from fedzge_flwr.data.recall import Arrays, digest_of, recall
from fedzge_flwr.images.image_set import ImageSet


@dataclass(frozen=True)
class ClientData:
    """One client's own images.

    Parameters
    ----------
    train : ImageSet
        The images that it trains on; may be empty.
    held_out : ImageSet
        The images that it keeps for evaluation; empty unless ``client-evaluation = "held-out"``.
    """

    train: ImageSet
    held_out: ImageSet


def partition_indices(
    settings: DataSettings, num_clients: int, seed: int
) -> tuple[npt.NDArray[np.int64], ...]:
    """Divide the training images among the clients.

    Parameters
    ----------
    settings : DataSettings
        Data set and partition.
    num_clients : int
        Number of partitions.
    seed : int
        The run's seed; the division depends on it and on nothing else.

    Returns
    -------
    tuple of ndarray of int64
        The indices into the training images of each partition.

    Raises
    ------
    DataError
        If the data cannot be divided as asked.
    """
    return _partition_indices(settings, num_clients, seed)


# As with the images: the same division is asked for by every message to a client.
@lru_cache(maxsize=4)
def _partition_indices(
    settings: DataSettings, num_clients: int, seed: int
) -> tuple[npt.NDArray[np.int64], ...]:
    labels = load_split(settings, "train").labels_N
    smallest = max(settings.min_partition_size, 1) if settings.partition == "dirichlet" else 1
    if smallest > len(labels) >= num_clients:
        raise DataError(
            f"'min-partition-size' = {smallest} is more than the {len(labels)} training images of "
            f"{settings.dataset}; for 'num-clients' = {num_clients} give at most "
            f"{len(labels) // num_clients}"
        )
    if num_clients * smallest > len(labels):
        raise DataError(
            f"'num-clients' = {num_clients} is too many for the {len(labels)} training images of "
            f"{settings.dataset} (at least {smallest} each): at most {len(labels) // smallest}"
        )

    def divide() -> Arrays:
        parts = _divide(settings, num_clients, seed, labels)
        return {"indices": np.concatenate(parts), "ends": np.cumsum([len(part) for part in parts])}

    kept = recall(
        "partition",
        divide,
        library="flwr-datasets",
        labels=digest_of(labels),
        how=settings.partition,
        alpha=settings.alpha,
        classes_per_client=settings.classes_per_client,
        min_partition_size=settings.min_partition_size,
        num_clients=num_clients,
        seed=seed,
    )
    return tuple(np.split(kept["indices"], kept["ends"][:-1]))


def _divide(
    settings: DataSettings, num_clients: int, seed: int, labels: npt.NDArray[np.int64]
) -> list[npt.NDArray[np.int64]]:
    # Importing flwr-datasets takes seconds and is needed nowhere else.
    import datasets
    from flwr_datasets.partitioner import (
        DirichletPartitioner,
        IidPartitioner,
        PathologicalPartitioner,
    )

    order = numpy_stream(seed, Purpose.PARTITION).permutation(len(labels))
    table = datasets.Dataset.from_dict({"label": labels[order], "index": order})
    if settings.partition == "iid":
        partitioner = IidPartitioner(num_partitions=num_clients)
    elif settings.partition == "pathological":
        partitioner = PathologicalPartitioner(
            num_partitions=num_clients,
            partition_by="label",
            num_classes_per_partition=settings.classes_per_client,
            class_assignment_mode="first-deterministic",
            seed=derive_seed(seed, Purpose.PARTITION),
        )
    else:
        partitioner = DirichletPartitioner(
            num_partitions=num_clients,
            partition_by="label",
            alpha=float(settings.alpha),
            min_partition_size=settings.min_partition_size,
            self_balancing=False,
            seed=derive_seed(seed, Purpose.PARTITION),
        )
    partitioner.dataset = table
    try:
        with warnings.catch_warnings():
            # One warning for each draw that is made again; the error below says it once.
            warnings.simplefilter("ignore", UserWarning)
            parts = [partitioner.load_partition(partition) for partition in range(num_clients)]
    except ValueError as error:
        raise DataError(_indivisible(settings, num_clients, len(labels))) from error
    return [np.asarray(part["index"], dtype=np.int64) for part in parts]


def _indivisible(settings: DataSettings, num_clients: int, num_images: int) -> str:
    if settings.partition == "pathological":
        return (
            f"'classes-per-client' = {settings.classes_per_client} of {settings.spec.num_classes} "
            f"classes cannot be given to each of 'num-clients' = {num_clients} with {num_images} "
            "images: lower one of the two"
        )
    return (
        f"no Dirichlet partition with 'alpha' = {settings.alpha} gave each of 'num-clients' = "
        f"{num_clients} at least 'min-partition-size' = {settings.min_partition_size} of "
        f"{num_images} images; raise alpha, lower the rest"
    )


def client_data(
    settings: DataSettings, num_clients: int, seed: int, partition: int, *, hold_out: bool
) -> ClientData:
    """Return the images of one client.

    Parameters
    ----------
    settings : DataSettings
        Data set and partition.
    num_clients, seed : int
        As in `partition_indices`.
    partition : int
        The client's partition, from 0.
    hold_out : bool
        Whether to keep ``holdout-fraction`` of the images, rounded, out of training.
    """
    images = load_split(settings, "train")
    indices = partition_indices(settings, num_clients, seed)[partition]
    return hold_out_some(images, indices, settings, seed, partition, hold_out=hold_out)


def hold_out_some(
    images: ImageSet,
    indices: npt.NDArray[np.int64],
    settings: DataSettings,
    seed: int,
    partition: int,
    *,
    hold_out: bool,
) -> ClientData:
    """Divide the images at ``indices`` between training and evaluation, as in `client_data`."""
    order = numpy_stream(seed, Purpose.HOLDOUT, partition=partition).permutation(len(indices))
    num_held_out = round(settings.holdout_fraction * len(indices)) if hold_out else 0
    return ClientData(
        train=images.take(np.sort(indices[order[num_held_out:]])),
        held_out=images.take(np.sort(indices[order[:num_held_out]])),
    )
