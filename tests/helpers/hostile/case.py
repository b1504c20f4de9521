"""What an attack is, and the place in which it is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.observers.round_row import RoundRow
from fedzge_flwr.wire.traffic import MissingReply, Traffic

SECRET = "the-secret-7f3ab2"

How = Literal["report", "doctor", "own"]
Outcome = Literal["refused", "harmless", "either"]


@dataclass(frozen=True)
class Place:
    """Where an attack is made.

    Parameters
    ----------
    folder : Path
        A new one for each attack.
    outside : Path
        A folder that no attack may have read: it holds texts, pictures and pickles with `SECRET`.
    canary : Path
        What an attack makes if something of it is run.
    """

    folder: Path
    outside: Path
    canary: Path

    def run(self, name: str = "run", rounds: int = 3) -> Path:
        """Make a run folder as a run leaves it."""
        folder = self.folder / name
        (folder / "generated").mkdir(parents=True)
        config = {
            "status": "finished",
            "seed": 0,
            "settings": from_run_config({}).to_run_config(),
            "versions": {"python": "3.11"},
            "clients": {"0": "33 examples on cpu", "1": "34 examples on cpu"},
            "class_counts": [[3] * 10, [4] * 10],
            "started": "2026-01-01T00:00:00+0000",
            "seconds": 3.5,
        }
        (folder / "config.json").write_text(json.dumps(config))
        lines = [json.dumps(row(number).to_json()) + "\n" for number in range(1, rounds + 1)]
        (folder / "rounds.jsonl").write_text("".join(lines))
        for number in range(1, rounds + 1):
            strip = np.full((8, 80), 20 * number, np.uint8)
            Image.fromarray(strip).save(folder / "generated" / f"round-{number:06d}.png")
        return folder

    def preset(self, text: str | bytes) -> Path:
        """Make a preset."""
        path = self.folder / "preset.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    def data(self, dataset: str, **more: object) -> Path:
        """Make a preset that names a data set in a folder of the attack's."""
        settings = {"dataset": dataset, "data-dir": str(self.folder / "data"), **more}
        settings |= {"output-dir": str(self.folder / "out"), "num-clients": 2}
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        return self.preset("\n".join(lines) + "\n")


@dataclass(frozen=True)
class Case:
    """An attack.

    Parameters
    ----------
    name : str
        What it does.
    how : str
        What opens it: ``fedzge report``, ``fedzge doctor --preset`` or a client's own data.
    make : Callable
        Makes it in a place and returns the path that is given to what opens it.
    outcome : str
        Refused in one line, opened as if nothing were, or either.
    leads_out : bool
        Whether the user names a link outside, or a folder of their own with one: it is followed,
        and what is there is not shown.
    """

    name: str
    how: How
    make: Callable[[Place], Path]
    outcome: Outcome = "refused"
    leads_out: bool = False


def row(number: int) -> RoundRow:
    """Return a row such as a run writes."""
    return RoundRow(
        round=number,
        central_accuracy=0.5,
        central_loss=1.0,
        ensemble_accuracy=0.6,
        mean_client_accuracy=0.4,
        client_accuracy={0: 0.4, 1: 0.4},
        sampled=(0, 1),
        participants=(0,),
        unmoved=(),
        missing=(MissingReply(1, "query.logits", "no reply"),),
        skipped=None,
        queries_per_client=100 * number,
        queries=200 * number,
        bytes_down=1000,
        bytes_up=1000,
        bytes_down_total=1000 * number,
        bytes_up_total=1000 * number,
        evaluation_bytes_down=0,
        evaluation_bytes_up=0,
        seconds=1.5,
        client_bytes={0: Traffic({"images": 500, "envelope": 20}, {"logits": 50})},
        loss={"generator": 0.5},
        phase_seconds={"ask_clients": 1.0, "distill_central": 0.5},
        answer_classes=(4,) * 10,
    )


def make_outside(outside: Path) -> None:
    """Make what is not to be read."""
    outside.mkdir()
    (outside / "text").write_text(f'password = "{SECRET}"\n{SECRET}\n')
    (outside / "config.json").write_text(json.dumps({"status": SECRET, "settings": {}}))
    strip = np.frombuffer(SECRET.encode().ljust(640, b"."), np.uint8).reshape(8, 80)
    for name in ("round-000001.png", "picture.png", "picture.jpg"):
        Image.fromarray(strip).save(outside / name, format="png")


def mutated(data: bytes, seed: int) -> bytes:
    """Return a file with something changed: bits, a piece lost, doubled, moved, or noise."""
    rng = np.random.default_rng(seed)
    changed = bytearray(data)
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 40))
    match int(rng.integers(6)):
        case 0:
            changed[at] ^= 1 << int(rng.integers(8))
        case 1:
            del changed[at:]
        case 2:
            del changed[at : at + length]
        case 3:
            changed[at:at] = changed[at : at + 10 * length]
        case 4:
            changed[at : at + length] = rng.bytes(length)
        case _:
            changed[at : at + 4] = bytes([255] * 4)
    return bytes(changed)
