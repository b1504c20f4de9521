"""Runs of several methods with several seeds, each in a process of its own; then the tables."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from fedzge_flwr.common.errors import ComparisonError, FedZGEError
from fedzge_flwr.common.text import duration, percent
from fedzge_flwr.compare.app import check_method, given_settings, run_here
from fedzge_flwr.compare.catalogue import METHODS, method_named
from fedzge_flwr.compare.page import write_page
from fedzge_flwr.compare.results import (
    Result,
    all_in,
    kept,
    markdown,
    of_settings,
    table,
    write,
    write_tables,
)
from fedzge_flwr.config.sections import Settings


@dataclass(frozen=True)
class Wanted:
    """One run that is to be there.

    Parameters
    ----------
    method : str
        The method's name.
    seed : int
        The run's seed.
    config : dict[str, Any]
        Its run config.
    settings : Settings
        What that says.
    """

    method: str
    seed: int
    config: dict[str, Any]
    settings: Settings

    def __str__(self) -> str:
        return f"{self.method}, seed {self.seed}"


def compare(
    methods: Sequence[str],
    seeds: Sequence[int],
    run_config: Mapping[str, Any],
    folder: Path,
    *,
    jobs: int | None = None,
    told: Callable[[str], None] = print,
) -> str:
    """Run what is not in the folder yet, write the tables and the page; return the table.

    Parameters
    ----------
    methods : Sequence[str]
        Names of methods; none: all of the package's that take these models.
    seeds : Sequence[int]
        Seeds of the runs.
    run_config : Mapping[str, Any]
        Settings of all runs, as FedZGE's default takes them.
    folder : Path
        Where results are kept, a file for each run.
    jobs : int
        Runs at the same time, each on one thread, at least 1; by default one for each core.
    told : Callable[[str], None]
        Takes lines of progress.

    Returns
    -------
    str
        The table in Markdown: of all results in the folder that are of these settings.

    Raises
    ------
    FedZGEError
        If a setting is wrong, data are missing, a run fails, or a file cannot be read or written.
    """
    wanted = _wanted(methods, seeds, run_config)
    missing = [one for one in wanted if kept(folder, one.method, one.seed, one.settings) is None]
    told(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them there already, in {folder}")
    most = jobs or psutil.cpu_count(logical=False) or 1
    _run(missing, folder, min(most, max(len(missing), 1)), told)
    results = of_settings(all_in(folder), given_settings(run_config), told)
    write_tables(folder, results)
    write_page(folder / "comparison.html", results)
    return markdown(table(results))


def _wanted(
    methods: Sequence[str], seeds: Sequence[int], run_config: Mapping[str, Any]
) -> list[Wanted]:
    """Return the runs, all settings of which are right."""
    found = []
    for seed in dict.fromkeys(seeds):
        config = {**run_config, "seed": seed}
        settings = given_settings(config)
        for name in dict.fromkeys(methods or METHODS):
            method = method_named(name)
            if methods or method.several_architectures or _one_model(settings):
                check_method(method, settings)
                found.append(Wanted(name, seed, config, settings))
    return found


def _one_model(settings: Settings) -> bool:
    clients = range(settings.run.num_clients)
    local = {settings.training.model_of(partition) for partition in clients}
    return local == {settings.distillation.central_model}


def _run(missing: Sequence[Wanted], folder: Path, jobs: int, told: Callable[[str], None]) -> None:
    """Run what is missing; results are kept as they come.

    Raises
    ------
    ComparisonError
        If a run fails.
    """
    if jobs == 1:
        for one in missing:
            _keep(_Outcome.of(one, told), folder, told)
        return
    before = set(psutil.Process().children(recursive=True))
    # A thread each: two processes with two threads each on two cores wait for one another.
    with (
        _environment("OMP_NUM_THREADS", "1"),
        ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        # FedZGE's own are the longest and the last: begun last, each would run alone at the end.
        futures = [pool.submit(_Outcome.of, one, print) for one in reversed(missing)]
        try:
            for future in as_completed(futures):
                _keep(future.result(), folder, told)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(psutil.Process().children(recursive=True)) - before:
                process.terminate()
            raise


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Have processes that are started find a variable set."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@dataclass(frozen=True)
class _Outcome:
    """What became of a run: its result, or the line of its error."""

    wanted: Wanted
    result: Result | None
    error: str = ""

    @classmethod
    def of(cls, wanted: Wanted, told: Callable[[str], None]) -> _Outcome:
        """Run it, on one thread; Flower's strategies log every step of theirs, and are quiet."""
        from fedzge_flwr.learning.numerics import threads

        logger = logging.getLogger("flwr")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            with threads(1):
                found = run_here(wanted.method, wanted.config, partial(_line, wanted, told))
            return cls(wanted, Result.of(wanted.method, wanted.settings, found))
        except FedZGEError as error:
            # As text: not every error passes from one process to another.
            return cls(wanted, None, str(error))
        finally:
            logger.setLevel(level)


def _line(one: Wanted, told: Callable[[str], None], line: str) -> None:
    told(f"{one}: {line}")


def _keep(outcome: _Outcome, folder: Path, told: Callable[[str], None]) -> None:
    one, result = outcome.wanted, outcome.result
    if result is None:
        raise ComparisonError(f"{one}: {outcome.error}")
    write(folder, result)
    told(f"{one}: {percent(result.accuracy)} after {duration(result.measured.seconds)}")
