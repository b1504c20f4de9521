"""The commands, their options and their help; each does its work in a module that it imports."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedzge_flwr.cli.given import Given
from fedzge_flwr.cli.streams import enduring_streams
from fedzge_flwr.common.errors import FedZGEError
from fedzge_flwr.common.version import __version__

if TYPE_CHECKING:
    from fedzge_flwr.launch.simulate import Resources

app = typer.Typer(
    name="fedzge",
    help="Data-free black-box federated learning on Flower.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PresetOption = Annotated[
    str | None, typer.Option(help="A preset's name (fedzge presets), or a TOML file of settings.")
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--run-config", metavar="'KEY=VALUE …'", help="Settings; may be repeated."),
]
OutputOption = Annotated[
    Path | None, typer.Option(help="The same as output-dir=… among the settings.")
]
CpusOption = Annotated[
    int | None, typer.Option(help="CPUs a client in simulation (1); as many run as fit.")
]
GpusOption = Annotated[
    float | None, typer.Option(help="Share of a GPU a client in simulation (0).")
]
RayOption = Annotated[
    str | None, typer.Option(metavar="'KEY=VALUE …'", help="More for Flower's Ray.")
]


@app.command(
    epilog="Examples:  fedzge run  |  fedzge run --preset cifar10-homo-a1 --run-config "
    "'data-dir=\"/data\"' --client-gpus 0.1  |  fedzge run --seeds 0,1,2 --run-config alpha=0.1"
    "  |  fedzge run --resume runs/NAME"
)
def run(
    preset: PresetOption = None,
    run_config: SettingsOption = None,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="0,1,…", help="One run after another, but for finished ones."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Folder of a run that was stopped: go on with it."),
    ] = None,
    output_dir: OutputOption = None,
    app_folder: Annotated[
        Path | None, typer.Option("--app", help="The app's folder; here, if here is one.")
    ] = None,
    deployment: Annotated[
        bool,
        typer.Option(
            "--deployment",
            help="No simulation: num-clients SuperNodes on loopback, with TLS and authentication.",
        ),
    ] = False,
    client_cpus: CpusOption = None,
    client_gpus: GpusOption = None,
    federation_config: RayOption = None,
) -> None:
    """Run FedZGE in Flower's simulation, or on a SuperLink, home and ports of its own."""
    with _told():
        from fedzge_flwr.cli.run import Launcher, run_seeds

        given = Given(preset, resume, tuple(run_config or ()), output_dir)
        simulations = (client_cpus, client_gpus, federation_config)
        if deployment and simulations != (None, None, None):
            raise FedZGEError("--deployment: --client-… and --federation-config are simulation's")
        resources = _resources(*simulations)
        launcher = Launcher(app_folder, None if deployment else resources)
        if seeds is None:
            print(f"run folder: {launcher(given.run_config())}")
        else:
            run_seeds(seeds, given, launcher)


@app.command(
    epilog="Examples:  fedzge report runs/NAME  |  fedzge report runs/*-paper-* runs/*-efficient-* "
    "-o comparison.html"
)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page.")] = Path("report.html"),
) -> None:
    """Make one page of a run, or of several that are compared, that needs no network."""
    with _told():
        from fedzge_flwr.report.page import write_report

        write_report(runs, output)
        print(f"report: {output}")


@app.command(
    epilog="Examples:  fedzge compare --run-config 'num-clients=5 alpha=0.1'  |  fedzge compare "
    "--methods fedavg,fedzge --seeds 0,1,2"
)
def compare(
    methods: Annotated[
        str | None,
        typer.Option(metavar="NAME,…", help="Which; without, all (docs/comparison.md)."),
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="0,1,…", help="A run of each for each.")] = "0",
    preset: PresetOption = None,
    run_config: SettingsOption = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of results, tables and page.")
    ] = Path("comparison"),
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at the same time; one for each core.")
    ] = None,
) -> None:
    """Run FedZGE and what a user would pick instead on the same clients; go on with what is there.

    Without Ray, each run on one thread. The settings are those of the default run.
    """
    with _told():
        from fedzge_flwr.cli.given import seeds_of
        from fedzge_flwr.common.reading import place
        from fedzge_flwr.compare.command import compare as compare_methods

        config = Given(preset, None, tuple(run_config or ())).run_config()
        folder = place(output, "--output")
        names = methods.split(",") if methods else []
        print(compare_methods(names, seeds_of(seeds), config, folder, jobs=jobs))
        print(f"page: {folder / 'comparison.html'}")


@app.command(
    epilog="Examples:  fedzge audit runs/NAME  |  fedzge audit --client 3 --outside test "
    "--run-config alpha=0.1  |  fedzge audit runs/NAME --node-config logit-noise=1 "
    "--fail-above 0.05"
)
def audit(
    run_or_config: Annotated[
        str | None,
        typer.Argument(metavar="[RUN_OR_CONFIG]", help="Run folder, preset or TOML file."),
    ] = None,
    client: Annotated[int, typer.Option(min=0, help="Whose endpoint: its partition.")] = 0,
    shadows: Annotated[
        int, typer.Option(min=2, help="Models that the attacker trains: an even number.")
    ] = 8,
    outside: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Images that the client does not have: a folder by class, an .npz file, or "
            "'test'. Without: half of its own are left out of training.",
        ),
    ] = None,
    run_config: SettingsOption = None,
    node_config: Annotated[
        list[str] | None,
        typer.Option(metavar="'KEY=VALUE …'", help="The owner's keys, such as logit-noise=1."),
    ] = None,
    fail_above: Annotated[
        float | None,
        typer.Option(
            metavar="TPR", min=0, max=1, help="End with 1 if more members are found at 1 % FPR."
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of findings, for the owner alone.")
    ] = Path("audit"),
) -> None:
    """Attack a client's endpoint as a server could, and say what it gives away.

    Its model and the attacker's are trained here; they are kept, and not trained again.
    """
    with _told():
        from fedzge_flwr.audit.command import audit_client
        from fedzge_flwr.cli.given import Given
        from fedzge_flwr.common.reading import place
        from fedzge_flwr.config.pairs import parse_pairs

        given = Given(None, None, tuple(run_config or ())).run_config()
        keys = parse_pairs(tuple(node_config or ()), "--node-config")
        folder = place(output, "--output")
        print(
            audit_client(run_or_config, given, client, shadows, outside, keys, folder, fail_above)
        )


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="Show this one; without, list all.")] = None,
) -> None:
    """List the published runs, or show the settings of one."""
    with _told():
        from fedzge_flwr.config.presets.catalogue import preset_file, preset_names

        if name is None:
            print("\n".join(preset_names()))
        else:
            print(preset_file(name).read_text(encoding="utf-8"), end="")


@app.command(
    epilog="Examples:  fedzge doctor  |  fedzge doctor --preset cifar10-homo-a1 --run-config "
    "'data-dir=\"/data\"'  |  fedzge doctor --port 8000"
)
def doctor(
    preset: PresetOption = None,
    run_config: SettingsOption = None,
    port: Annotated[
        list[int] | None, typer.Option(help="A port to be free; may be repeated.")
    ] = None,
    output_dir: OutputOption = None,
    client_cpus: CpusOption = None,
    client_gpus: GpusOption = None,
    federation_config: RayOption = None,
) -> None:
    """Check software, GPU, Ray, network, folders, ports and data, and say what to mend."""
    with _told():
        from fedzge_flwr.cli.doctor import examine

        resources = _resources(client_cpus, client_gpus, federation_config)
        given = Given(preset, None, tuple(run_config or ()), output_dir)
        healthy = examine(given, port, resources)
    raise typer.Exit(0 if healthy else 1)


def _resources(cpus: int | None, gpus: float | None, more: str | None) -> Resources:
    from fedzge_flwr.launch.simulate import Resources

    default = Resources()
    return Resources(
        default.num_cpus if cpus is None else cpus,
        default.num_gpus if gpus is None else gpus,
        more or "",
    )


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _common(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    """Data-free black-box federated learning on Flower."""


@contextmanager
def _told() -> Iterator[None]:
    """Tell errors in one line, and what Ctrl-C has done."""
    from fedzge_flwr.launch.session import STOPPING_SIGNALS

    # A shell starts background jobs with SIGINT ignored, and Python then leaves it so.
    for sign in STOPPING_SIGNALS:
        signal.signal(sign, _interrupt)
    try:
        yield
    except FedZGEError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        # Impatience while Python ends would change the exit code.
        for sign in STOPPING_SIGNALS:
            signal.signal(sign, signal.SIG_IGN)
        print("interrupted; all processes that were started have been ended", file=sys.stderr)
        raise typer.Exit(130) from None


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run ``fedzge``."""
    with enduring_streams():
        app()
