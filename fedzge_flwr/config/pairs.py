"""``KEY=VALUE …`` as people type it, in the form that ``flwr run --run-config`` takes."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence

from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.common.text import printable

Value = str | int | float | bool

# As Flower's `parse_config_args`, so that a text means here what it means there.
_PAIR = re.compile(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)")
_QUOTED = re.compile(r"['\"].*['\"]", re.DOTALL)


def parse_pairs(texts: Sequence[str], option: str) -> dict[str, Value]:
    """Return what texts of ``KEY=VALUE``, separated by spaces, say; later texts overrule.

    Parameters
    ----------
    texts : Sequence[str]
        Values are TOML: numbers, true, false, and texts in quotes.
    option : str
        Where they were given, for errors.

    Raises
    ------
    ConfigError
        If a part is no such pair, a value is not TOML, or a text gives a key twice; the line names
        the part and what to write.
    """
    found: dict[str, Value] = {}
    for text in texts:
        # Flower passes over whatever is not KEY=VALUE, such as KEY = VALUE.
        if rest := _PAIR.sub("", text).split():
            raise ConfigError(f"{option}: '{printable(rest[0])}' is not KEY=VALUE (without spaces)")
        pairs: list[tuple[str, str]] = _PAIR.findall(text)
        for at, (key, value) in enumerate(pairs):
            if key in dict(pairs[:at]):
                raise ConfigError(f"{option}: '{printable(key)}' is given twice; give it once")
            found[key] = _value(key, value, option)
    return found


def _value(key: str, text: str, option: str) -> Value:
    try:
        # A key of Flower's parser is TOML too, but no setting's name needs quotes.
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, (str, int, float, bool)):
        return value
    shown = f"{option}: {printable(f'{key}={text}')}"
    if text.lower() in ("true", "false"):
        raise ConfigError(f"{shown}: write {text.lower()}")
    if _QUOTED.fullmatch(text):
        raise ConfigError(f"{shown}: the text in quotes is not TOML; write \\\\ for a backslash")
    raise ConfigError(
        f"{shown}: the value is no number, true or false; a text is in quotes: {printable(key)}="
        f'"{printable(text)}"'
    )
