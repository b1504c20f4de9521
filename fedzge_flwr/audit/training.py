"""Trains the models of an audit, as many at a time as there are cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fedzge_flwr.audit.subjects import Subject
from fedzge_flwr.black_boxes.partition import TorchBlackBox
from fedzge_flwr.images.spec import DATASETS
from fedzge_flwr.learning.models.catalogue import MODELS


def train_all(
    subjects: Sequence[Subject], folder: Path, told: Callable[[str], None]
) -> list[TorchBlackBox]:
    """Train the models that the folder has not yet, and return all of them.

    Several are trained at a time, on one thread each, in processes of their own. Those know no
    model and no data set that the program has added to the registries: such are trained in this
    one.

    Parameters
    ----------
    subjects : Sequence of Subject
        The client, and then its shadows.
    folder : Path
        Where models are kept.
    told : Callable[[str], None]
        Takes a line for each model.

    Raises
    ------
    AuditError, DataError
        As `Subject.trained`.
    """
    missing = [i for i, subject in enumerate(subjects) if not subject.path(folder).exists()]
    for number in range(len(subjects)):
        if number not in missing:
            told(f"{_name(number, len(subjects))}: was there")
    for number in _trained(subjects, missing, folder):
        told(f"{_name(number, len(subjects))}: trained on {len(subjects[number].images):,} images")
    return [subject.trained(folder) for subject in subjects]


def _name(number: int, num_subjects: int) -> str:
    return f"shadow {number} of {num_subjects - 1}" if number else "client"


def _trained(subjects: Sequence[Subject], missing: Sequence[int], folder: Path) -> Iterator[int]:
    """Train models; give the number of each when it is done."""
    from joblib import Parallel, cpu_count, delayed, parallel_config
    from joblib.externals.loky import get_reusable_executor

    processes = min(len(missing), cpu_count())
    if processes < 2 or any(_is_from_outside(subject) for subject in subjects):
        for number in missing:
            yield _train(subjects[number], folder, number)
        return
    try:
        with parallel_config("loky", n_jobs=processes, inner_max_num_threads=1):
            yield from Parallel(return_as="generator_unordered")(
                delayed(_train)(subjects[number], folder, number) for number in missing
            )
    finally:
        # They would wait for more work for minutes, a gigabyte each.
        get_reusable_executor().shutdown()


def _is_from_outside(subject: Subject) -> bool:
    return subject.model in MODELS.added() or subject.settings.data.dataset in DATASETS.added()


def _train(subject: Subject, folder: Path, number: int) -> int:
    subject.trained(folder)
    return number
