"""What is given on the command line, as settings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.common.reading import place
from fedzge_flwr.common.text import printable
from fedzge_flwr.config.pairs import parse_pairs
from fedzge_flwr.config.presets.catalogue import preset_file, read_settings


def seeds_of(text: str) -> list[int]:
    """Return the numbers of ``--seeds``, each once.

    Raises
    ------
    ConfigError
        If they are not whole numbers between commas.
    """
    shown = f"--seeds {printable(text)}"
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*", text):
        raise ConfigError(f"{shown}: give whole numbers between commas, such as 0,1,2")
    try:
        return list(dict.fromkeys(int(number) for number in text.split(",")))
    except ValueError:  # thousands of digits
        raise ConfigError(f"{shown}: give smaller numbers") from None


@dataclass(frozen=True)
class Given:
    """Where a run's settings come from; later fields overrule earlier ones.

    Parameters
    ----------
    preset : str, optional
        Name or file of a preset.
    resume : Path, optional
        Folder of a run that was stopped.
    pairs : Sequence[str]
        Texts of ``KEY=VALUE`` separated by spaces.
    output_dir : Path, optional
        Parent of the run folder, unless ``pairs`` name it.
    """

    preset: str | None = None
    resume: Path | None = None
    pairs: Sequence[str] = field(default_factory=tuple)
    output_dir: Path | None = None

    def run_config(self) -> dict[str, Any]:
        """Return the settings that differ from the app's defaults, unchecked.

        Raises
        ------
        ConfigError
            If a file cannot be read, or a text is not ``KEY=VALUE``.
        """
        config: dict[str, Any] = {}
        if self.preset is not None:
            config |= read_settings(preset_file(self.preset))
        if self.resume is not None:
            folder = place(self.resume, "--resume")
            if not (folder / "resume.toml").is_file():
                raise ConfigError(f"{folder}: not the folder of a run, it has no resume.toml")
            config |= {**read_settings(folder / "resume.toml", links=False), "resume": str(folder)}
        if self.output_dir is not None:
            config["output-dir"] = str(place(self.output_dir, "--output-dir"))
        return config | parse_pairs(self.pairs, "--run-config")
