"""From Flower's run config to `Settings`, and what a run config looks like."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.config.sections import (
    ClientSettings,
    DataSettings,
    OptimizerSettings,
    Paper,
    RunSettings,
    Section,
    ServerSettings,
    Settings,
    TransferSettings,
    kebab,
)
from fedzge_flwr.images.spec import OWN

AUTO = "auto"
"""Written for a setting whose default depends on the recipe, it asks for that default."""

SECTIONS: dict[str, type[Section]] = {
    "run": RunSettings,
    "data": DataSettings,
    "optimizer": OptimizerSettings,
    "client": ClientSettings,
    "server": ServerSettings,
    "transfer": TransferSettings,
}

NUMBERS_DO_NOT_DEPEND_ON = frozenset(
    {
        "output-dir",
        "run-name",
        "resume",
        "checkpoint-every",
        "tensorboard",
        "exchange-timeout",
        "train-timeout",
        "query-timeout",
        "distill-timeout",
        "evaluate-timeout",
        "node-timeout",
        "data-dir",
        "download",
        "server-device",
        "server-threads",
        "client-device",
        "client-threads",
    }
)
"""Settings by which runs do not count as different, when one is resumed or several are compared;
devices and threads change the last bits at most."""


def paper_defaults() -> dict[str, object]:
    """Return the keys whose default depends on the recipe, with that of ``recipe = "paper"``."""
    return {
        kebab(name): mark.default
        for section in SECTIONS.values()
        for name, field in section.model_fields.items()
        for mark in field.metadata
        if isinstance(mark, Paper)
    }


def default_run_config() -> dict[str, Any]:
    """Return the run config in which every key asks for its default."""
    return Settings().to_run_config() | dict.fromkeys(paper_defaults(), AUTO)


def from_run_config(run_config: Mapping[str, object]) -> Settings:
    """Parse Flower's run config.

    Parameters
    ----------
    run_config : Mapping[str, object]
        Flat mapping from kebab-case key to value; a key that is absent takes its default, as does
        one with the value "auto" if its default depends on the recipe.

    Raises
    ------
    ConfigError
        On an unknown key, a value of the wrong type or out of range, or settings that contradict
        one another; one line that names the key and what is allowed.
    """
    owner = {
        kebab(field): name for name, section in SECTIONS.items() for field in section.model_fields
    }
    by_section: dict[str, dict[str, object]] = {name: {} for name in SECTIONS}
    by_recipe = paper_defaults()
    given = {
        key: value for key, value in run_config.items() if not (key in by_recipe and value == AUTO)
    }
    if run_config.get("recipe") == "paper":
        given = by_recipe | given
    for key, value in given.items():
        if key not in owner:
            close = difflib.get_close_matches(key, owner, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise ConfigError(f"run config: unknown key '{key}': {hint}known: {', '.join(owner)}")
        by_section[owner[key]][key] = value
    try:
        return Settings(
            **{name: SECTIONS[name].model_validate(by_section[name]) for name in SECTIONS}
        )
    except ValidationError as error:
        raise ConfigError(f"run config: {one_line(error)}") from None


def make_settings(
    *,
    image_shape: tuple[int, int, int] | None = None,
    num_classes: int = 0,
    **given: object,
) -> Settings:
    """Return settings for a project with models and data of its own.

    Defaults are those of the run config, but that the server leaves torch its number of threads
    (``server_threads=0``): the process is the project's.

    Parameters
    ----------
    image_shape : tuple of int, optional
        (C, H, W) of the images. With it the data set is ``"own"``, and evaluation on a common test
        set is off: give the strategy an ``evaluate_fn`` instead.
    num_classes : int
        Number of classes K, with ``image_shape``.
    **given
        Other settings, with underscores: ``num_clients=5, alpha=0.1``.

    Raises
    ------
    ConfigError
        As in `from_run_config`.

    Examples
    --------
    >>> settings = make_settings(image_shape=(3, 32, 32), num_classes=10, num_clients=5, q=4)
    >>> settings.server.q, settings.run.num_clients, settings.data.dataset
    (4, 5, 'own')
    """
    config: dict[str, object] = {"server-threads": 0}
    if image_shape is not None:
        if not isinstance(image_shape, Sequence) or len(image_shape) != 3:
            raise ConfigError(f"image_shape = {image_shape!r}: give (channels, height, width)")
        config |= {
            "dataset": OWN,
            "image-shape": ",".join(map(str, image_shape)),
            "num-classes": num_classes,
            "client-evaluation": "off",
            "server-evaluation": "off",
        }
    return from_run_config(config | {kebab(name): value for name, value in given.items()})


def one_line(error: ValidationError) -> str:
    """Tell the first problem that pydantic found in one line, with the key as the user wrote it."""
    problem = error.errors(include_url=False)[0]
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if not problem["loc"]:
        return message
    shown = repr(problem["input"])
    return f"'{problem['loc'][0]}' = {shown}: {message[0].lower()}{message[1:]}"
