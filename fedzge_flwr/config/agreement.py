"""Whether a client learns by the settings that its server has, without saying which it has.

A request has four digits for each setting, and a reply a bit: whether the client's own differs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from fedzge_flwr.config.sections import OptimizerSettings, Settings, TrainingSettings, kebab

_DIGITS = 4

_DISTILLATION_KEYS = (
    "class-balance",
    "client-distill-lr",
    "client-distill-max-norm",
    "client-distill-steps",
    "client-rehearsal",
    "distill-batch-size",
)
_NOT_LEARNING = ("local-models", "local-rounds")


def distilling_by(settings: Settings) -> dict[str, object]:
    """Return, by key, the settings that a client distills by, and how long it trains at all."""
    keys = {*_DISTILLATION_KEYS, *_kebab(OptimizerSettings), "local-rounds"}
    return {key: value for key, value in settings.to_run_config().items() if key in keys}


def training_by(settings: Settings) -> dict[str, object]:
    """Return, by key, the settings by which a client trains that has no training of its own."""
    keys = _kebab(TrainingSettings) - set(_NOT_LEARNING)
    return {key: value for key, value in settings.to_run_config().items() if key in keys}


def learning_by(settings: Settings) -> dict[str, object]:
    """Return all of both, in order of their keys."""
    found = {**distilling_by(settings), **training_by(settings)}
    return {key: found[key] for key in sorted(found)}


def digits_of(settings: Settings) -> str:
    """Return four hexadecimal digits for each setting of `learning_by`."""
    return "".join(_digits(value) for value in learning_by(settings).values())


def differing_bits(digits: str, learns_by: Mapping[str, object]) -> str:
    """Return which settings differ from a server's.

    Parameters
    ----------
    digits : str
        `digits_of` the server's.
    learns_by : Mapping[str, object]
        The client's own, by key; of others it says nothing.

    Returns
    -------
    str
        16 hexadecimal digits, a bit for each setting; empty if the server knows other settings.
    """
    keys = list(learning_by(Settings()))
    if len(digits) != _DIGITS * len(keys):
        return ""
    bits = 0
    for number, key in enumerate(keys):
        theirs = digits[_DIGITS * number : _DIGITS * (number + 1)]
        bits |= (key in learns_by and _digits(learns_by[key]) != theirs) << number
    return f"{bits:016x}"


def differing_keys(bits: str) -> list[str]:
    """Return the keys of the settings that `differing_bits` marks."""
    marks = int(bits or "0", 16)
    return [key for number, key in enumerate(learning_by(Settings())) if marks >> number & 1]


def _digits(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=_DIGITS // 2).hexdigest()


def _kebab(section: type[OptimizerSettings] | type[TrainingSettings]) -> set[str]:
    return {kebab(field) for field in section.model_fields}
