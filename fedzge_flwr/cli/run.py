"""One run, or the same with several seeds."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedzge_flwr.cli.given import Given, seeds_of
from fedzge_flwr.common.errors import ConfigError, RunFolderError
from fedzge_flwr.common.reading import parse_json, place, read_within
from fedzge_flwr.common.text import percent, percent_spread
from fedzge_flwr.config.parsing import NUMBERS_DO_NOT_DEPEND_ON, from_run_config
from fedzge_flwr.config.sections import MOST_NAME_BYTES
from fedzge_flwr.launch.deployment import deploy
from fedzge_flwr.launch.simulate import Resources, simulate
from fedzge_flwr.observers.naming import name_without_seed
from fedzge_flwr.report.runs import ACCURACIES, Run, load_run

_MOST_CONFIG_BYTES = 16_000_000


@dataclass(frozen=True)
class Launcher:
    """Starts a run and waits for it.

    Parameters
    ----------
    app : Path, optional
        The app's folder; without, the current folder, or the checkout that this package is in.
    resources : Resources, optional
        What each client of a simulation is given; None: a deployment on loopback.
    """

    app: Path | None
    resources: Resources | None

    def __call__(self, run_config: Mapping[str, Any]) -> Path:
        """Run to the end and return the run folder.

        Raises
        ------
        FedZGEError
            If a setting is wrong, there is no app, or the run fails.
        """
        app = self.app or _app_here()
        return (
            deploy(app, run_config)
            if self.resources is None
            else simulate(app, run_config, self.resources)
        )


def _app_here() -> Path:
    for folder in (Path.cwd(), Path(__file__).resolve().parents[2]):
        try:
            whole: Any = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for key in ("tool", "flwr", "app", "config"):
            # Of others' projects it may be anything.
            whole = whole.get(key) if isinstance(whole, dict) else None
        # Only an app with this package's settings takes what is sent to it.
        if isinstance(whole, dict) and "recipe" in whole:
            return folder
    raise ConfigError(
        "there is no FedZGE app here: name the folder of one, such as a checkout, with --app"
    )


def run_seeds(seeds: str, given: Given, launch: Launcher) -> None:
    """Run once per seed, into sibling folders, and print a table of their last rounds.

    Finished runs with the same settings are kept; those that were stopped are gone on with.

    Raises
    ------
    FedZGEError
        If the seeds are not numbers, a folder is taken by another run, or a run fails.
    """
    configs = _configs(seeds, given)
    folders = {}
    for seed, config in configs.items():
        folder = Path(config["output-dir"]) / config["run-name"]
        if _is_finished(folder, config):
            print(f"seed {seed}: finished already, in {folder}", flush=True)
        else:
            print(f"seed {seed}:", flush=True)
            launch({**config, "resume": str(folder)} if folder.exists() else config)
        folders[seed] = folder
    sys.stdout.write(_table({seed: load_run(folder) for seed, folder in folders.items()}))


def _configs(seeds: str, given: Given) -> dict[int, dict[str, Any]]:
    """Return each run's settings by seed, all of which are right."""
    if given.resume is not None:
        raise ConfigError("--seeds: without --resume; runs that were stopped are gone on with")
    numbers = seeds_of(seeds)
    common = given.run_config()
    if common.get("resume"):
        raise ConfigError("--seeds: without 'resume'; runs that were stopped are gone on with")
    settings = from_run_config(common)
    name = settings.run.run_name or name_without_seed(settings)
    parent = place(settings.run.output_dir, "output-dir")
    configs = {
        seed: {**common, "seed": seed, "output-dir": str(parent), "run-name": f"{name}-s{seed}"}
        for seed in numbers
    }
    # Also of the last, before the first is started.
    for seed, config in configs.items():
        if len(config["run-name"].encode()) > MOST_NAME_BYTES:
            raise ConfigError(
                f"'run-name' = '{name}': with '-s{seed}' it has over {MOST_NAME_BYTES} bytes; "
                "give a shorter one"
            )
        from_run_config(config)
    return configs


def _is_finished(folder: Path, config: Mapping[str, Any]) -> bool:
    """Say whether a run is finished; False: it is to be started, or to be gone on with."""
    if not folder.exists():
        return False
    try:
        found = parse_json(read_within(folder, "config.json", _MOST_CONFIG_BYTES))
        status, kept = str(found["status"]), dict(found["settings"])
    except (OSError, ValueError, LookupError, TypeError):
        raise RunFolderError(f"{folder} exists and is not the folder of a run; remove it") from None
    wanted = from_run_config(config).to_run_config()
    for key in sorted(wanted.keys() - NUMBERS_DO_NOT_DEPEND_ON):
        if key not in kept or kept[key] != wanted[key]:
            other = f"with '{key}' = {kept[key]!r}" if key in kept else f"that had no '{key}'"
            raise RunFolderError(
                f"{folder} is of a run {other}, not {wanted[key]!r}; "
                "remove it, or name this one otherwise with 'run-name'"
            )
    if status == "finished":
        return True
    if not any((folder / "checkpoints").glob("round-*")):
        raise RunFolderError(
            f"{folder} is of a run that ended as '{status}' without a checkpoint; remove it"
        )
    return False


def _table(by_seed: Mapping[int, Run]) -> str:
    # Takes a second, and is needed at the end alone.
    import pandas as pd

    last = {
        name: {str(seed): run.last(reading) for seed, run in by_seed.items()}
        for name, reading in ACCURACIES.items()
    }
    shown = {
        name: {**{seed: percent(found) for seed, found in column.items()}, "mean ± std": spread}
        for name, column in last.items()
        for spread in [percent_spread(list(column.values()))]
    }
    return pd.DataFrame(shown).rename_axis(columns="seed").to_string(col_space=15) + "\n"
