"""``python -m fedzge_flwr.launch``: ``make run`` and ``make deploy-demo`` call this."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import tomllib
from pathlib import Path
from typing import Any

from fedzge_flwr.errors import FedZGEError
from fedzge_flwr.launch.deployment import deploy
from fedzge_flwr.launch.session import STOPPING_SIGNALS
from fedzge_flwr.launch.simulate import Resources, simulate


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _read_preset(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FedZGEError(
            f"--preset {path}: {error.strerror}; the presets are in configs/"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise FedZGEError(f"--preset {path}: not TOML ({error})") from error


def _run_config(preset: Path | None, pairs: list[str]) -> dict[str, Any]:
    # Flower's own parser, so that KEY=VALUE means here what it means to `flwr run`.
    from click import ClickException
    from flwr.common.config import parse_config_args

    for text in pairs:
        # Flower passes over whatever is not KEY=VALUE, such as KEY = VALUE.
        if rest := re.sub(r"\S+?=('[^']*'|\"[^\"]*\"|\S+)", "", text).split():
            raise FedZGEError(f"--run-config: '{rest[0]}' is not KEY=VALUE (without spaces)")
    try:
        overrides = parse_config_args(pairs)
    except (ClickException, ValueError) as error:
        raise FedZGEError(f"--run-config: {error}") from error
    return {**(_read_preset(preset) if preset else {}), **overrides}


def _resources(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {
        "num_cpus": arguments.client_cpus,
        "num_gpus": arguments.client_gpus,
        "more": arguments.federation_config,
    }
    return {name: value for name, value in given.items() if value is not None}


def main() -> int:
    """Parse the command line, run, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fedzge_flwr.launch",
        description="Run FedZGE through `flwr run`, in Ray-backed simulation or, with "
        "--deployment, on a SuperLink and SuperNodes of its own.",
        epilog="example: python -m fedzge_flwr.launch --preset configs/cifar10-homo-a1.toml "
        "--run-config 'seed=1 data-dir=\"/data\"' --client-gpus 0.1",
    )
    parser.add_argument("--app", type=Path, default=Path(__file__).resolve().parents[2])
    parser.add_argument("--preset", type=Path, help="a TOML file of settings")
    parser.add_argument(
        "--resume", type=Path, metavar="RUN", help="folder of a run that was stopped: go on with it"
    )
    parser.add_argument(
        "--run-config", action="append", default=[], metavar="'KEY=VALUE …'", help="settings"
    )
    parser.add_argument("--output-dir", type=Path, help="the same as output-dir=…")
    parser.add_argument(
        "--deployment",
        action="store_true",
        help="no simulation: num-clients SuperNodes on loopback, with TLS and authentication",
    )
    simulation = parser.add_argument_group("simulation")
    simulation.add_argument("--client-cpus", type=int, help="CPUs a client (default 1)")
    simulation.add_argument("--client-gpus", type=float, help="share of a GPU a client (default 0)")
    simulation.add_argument(
        "--federation-config", metavar="'KEY=VALUE …'", help="more for Flower's Ray"
    )
    arguments = parser.parse_args()
    # A shell starts background jobs with SIGINT ignored, and Python then leaves it so.
    for sign in STOPPING_SIGNALS:
        signal.signal(sign, _interrupt)
    try:
        run_config = _run_config(arguments.preset, arguments.run_config)
        if arguments.resume is not None:
            folder = arguments.resume.expanduser().absolute()
            run_config = {**_read_preset(folder / "resume.toml"), **run_config}
            run_config["resume"] = str(folder)
        if arguments.output_dir is not None:
            run_config.setdefault("output-dir", str(arguments.output_dir.expanduser().absolute()))
        resources = _resources(arguments)
        if not arguments.deployment:
            folder = simulate(arguments.app, run_config, Resources(**resources))
        elif resources:
            raise FedZGEError("--deployment: --client-… and --federation-config are simulation's")
        else:
            folder = deploy(arguments.app, run_config)
    except FedZGEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; all processes of the run have been ended", file=sys.stderr)
        return 130
    print(f"run folder: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
