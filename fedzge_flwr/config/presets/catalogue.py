"""The published runs as files of settings, and reading such files."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any

from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.common.reading import place, read_file, read_within

PAPER = "paper"
"""The preset of the published round, which the other presets repeat and add to."""

_MOST_BYTES = 1_000_000
_FOLDER = Path(__file__).parent


def preset_names() -> list[str]:
    """Return the names of the presets that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def preset_file(preset: str) -> Path:
    """Return a preset's file: one that comes with the package by its name, or any by its path.

    Raises
    ------
    ConfigError
        If there is neither.
    """
    if preset in preset_names():
        return _FOLDER / f"{preset}.toml"
    path = place(preset, "--preset")
    if path.is_file():
        return path
    near = difflib.get_close_matches(preset, preset_names(), n=1)
    hint = f"did you mean '{near[0]}'?" if near else "`fedzge presets` lists the names"
    raise ConfigError(f"preset '{preset}': no preset and no file has that name; {hint}")


def read_settings(path: Path, *, links: bool = True) -> dict[str, Any]:
    """Return the settings that a TOML file holds, unchecked.

    Parameters
    ----------
    path : Path
        The file.
    links : bool
        Whether it may be a link; one within a folder of others may lead anywhere.

    Raises
    ------
    ConfigError
        If it cannot be read, has more than 1 MB, or is not TOML.
    """
    try:
        if links:
            data = read_file(path, _MOST_BYTES)
        else:
            data = read_within(path.parent, path.name, _MOST_BYTES)
        # Some editors begin it with a mark of the encoding.
        return tomllib.loads(data.decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a file of settings") from error
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply; settings are a line each") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not TOML ({error}); mend it") from error


def paper_settings() -> dict[str, Any]:
    """Return the settings of the preset `PAPER`."""
    return read_settings(preset_file(PAPER))
