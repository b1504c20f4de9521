"""What a round costs: bytes, seconds against a plain loop, memory, many clients, a GPU.

``python -m benchmarks.round_cost --data-dir DIR --json FILE`` prints a table for each; finished
tables are kept in FILE. ``--parts`` chooses among them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.costs.gpu import gpu_rows, visible_gpu
from benchmarks.costs.memory import memory_rows
from benchmarks.costs.simulated import overhead_rows, scale_row
from benchmarks.costs.wire import byte_rows
from benchmarks.told import kept_in, told
from fedzge_flwr.common.files import atomic_write_text
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.presets.catalogue import preset_file, read_settings
from fedzge_flwr.config.sections import Settings

Row = dict[str, Any]
PARTS = ("bytes", "memory", "overhead", "scale", "gpu")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.round_cost", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--preset",
        type=Path,
        default=preset_file("cifar10-homo-a1"),
        help="TOML file whose shapes bytes and memory are of, and whose rounds a GPU runs",
    )
    parser.add_argument("--dataset", default="fashionmnist", help="of overhead and scale")
    parser.add_argument("--data-dir", type=Path, default=Path("~/fedzge-data"))
    parser.add_argument("--clients", default="10,100,1000", help="of scale, with commas")
    parser.add_argument("--images-a-client", type=int, default=60, help="of scale")
    parser.add_argument("--rounds", type=int, default=20, help="of scale")
    parser.add_argument("--client-gpus", type=float, default=0.1, help="of gpu: share of each")
    parser.add_argument("--gpu-rounds", type=int, default=3, help="the first is not counted")
    parser.add_argument("--overhead-rounds", type=int, default=4, help="the first is not counted")
    parser.add_argument("--json", type=Path, help="keep finished rows here, and go on from it")
    return parser.parse_args(arguments)


def light(options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Return the settings of a round that is mostly the clients' own."""
    return {
        "dataset": options.dataset,
        "data-dir": str(options.data_dir.expanduser().absolute()),
        "partition": "iid",
        "num-test-images": 100,
        "client-evaluation": "off",
        "server-evaluation": "off",
        "local-epochs": 1,
        "min-local-steps": 0,
        "local-rounds": 0,
        "synthetic-batch-size": 100,
        "generator-share": 1.0,
        "central-distill-steps": 5,
        "client-distill-steps": 0,
        "candidates": 1,
        "generator-steps": 1,
        "server-device": "cpu",
        "client-device": "cpu",
        **more,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = parse(arguments)
    preset = from_run_config(read_settings(options.preset))
    kept: dict[str, list[Row]] = kept_in(options.json, dict)
    for name, make in parts(options, preset):
        if name not in kept:
            _say(name)
            kept[name] = list(make())
            if options.json is not None:
                atomic_write_text(options.json, json.dumps(kept, indent=1) + "\n")
        print(f"\n**{name}**\n\n{markdown(kept[name])}", flush=True)


def parts(
    options: argparse.Namespace, preset: Settings
) -> Iterator[tuple[str, Callable[[], Iterable[Row]]]]:
    """Yield the tables asked for, by name, and how to make each."""
    if "bytes" in options.parts:
        yield f"bytes a client and round, {options.preset.stem}", lambda: byte_rows(preset)
    if "memory" in options.parts:
        yield f"memory of an estimate, {options.preset.stem}", lambda: memory_rows(preset)
    if "overhead" in options.parts:
        for model, images in (("resnet18", 2000), ("cnn", 600)):
            config = light(
                options, **{"num-clients": 10, "num-train-images": images, "local-models": model}
            )
            rounds = options.overhead_rounds
            yield (
                f"seconds a round, 10 clients of {model}, {images} images of {options.dataset}, "
                f"{rounds} rounds",
                lambda config=config, rounds=rounds: overhead_rows(config, rounds),  # type: ignore[misc]
            )
    if "scale" in options.parts:
        for clients, sampled in scales([int(text) for text in options.clients.split(",")]):
            config = light(options, **{"num-train-images": clients * options.images_a_client})
            yield (
                f"{sampled} of {clients} clients a round, {options.images_a_client} images of "
                f"{options.dataset} each, {options.rounds} rounds",
                lambda config=config, c=clients, s=sampled: [  # type: ignore[misc]
                    scale_row(config, c, s, options.rounds)
                ],
            )

    if "gpu" in options.parts and not visible_gpu():
        _say("gpu: nvidia-smi finds none, so nothing is measured")
    elif "gpu" in options.parts:
        paper = read_settings(options.preset)
        runs = {options.preset.stem: paper, "efficient": {"num-clients": preset.run.num_clients}}
        yield (
            f"seconds a round on a GPU, random images of CIFAR-10's shape, {options.gpu_rounds} "
            "rounds",
            lambda: gpu_rows(runs, options.client_gpus, options.gpu_rounds),
        )


def scales(counts: list[int]) -> Iterator[tuple[int, int]]:
    """Yield clients and how many of them a round: all of up to 100, 2 % of more.

    Beside the latter, a federation of just as many as take part.
    """
    for count in counts:
        if count <= 100:
            yield count, count
        else:
            sampled = math.ceil(0.02 * count)
            yield sampled, sampled
            yield count, sampled


def markdown(rows: list[Row]) -> str:
    """Return rows as a table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |"]
    lines.append("|" + "---|" * len(names))
    lines += ["| " + " | ".join(_cell(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(part)}" for name, part in value.items())
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    told(main)
