"""From Flower's run config to `Settings`: one frozen, validated view of it.

Every key is kebab-case and flat; `from_run_config` sorts the keys into the sections that the parts
of the system take. What a node's owner sets for that node alone is
`fedzge_flwr.config.node.NodeSettings`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.common.text import printable
from fedzge_flwr.config.presets.catalogue import paper_settings
from fedzge_flwr.config.sections import (
    DataSettings,
    DistillationSettings,
    ImageSettings,
    OptimizerSettings,
    QuerySettings,
    RunSettings,
    Section,
    Settings,
    TrainingSettings,
    kebab,
)
from fedzge_flwr.images.spec import OWN

_MOST_CHARACTERS = 100
_MOST_NUMBER = 2**63 - 1

_SUCCESSORS = {
    "wire": '\'transport\' = "compact" or "dense" (dense: an exchange for each phase)',
    "exchanges": '\'transport\' = "compact" (one exchange a round) or "dense" (one for each phase)',
}
"""Keys of earlier versions, and what says it now."""

SECTIONS: dict[str, type[Section]] = {
    "run": RunSettings,
    "data": DataSettings,
    "images": ImageSettings,
    "queries": QuerySettings,
    "training": TrainingSettings,
    "distillation": DistillationSettings,
    "optimizer": OptimizerSettings,
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
        "quorum",
        "grace-period",
        "node-ids",
        "node-changes",
        "data-changes",
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


def from_run_config(run_config: Mapping[str, object]) -> Settings:
    """Parse Flower's run config.

    Parameters
    ----------
    run_config : Mapping[str, object]
        Flat mapping from kebab-case key to value; a key that is absent takes its default.

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
    for key, value in run_config.items():
        if key not in owner:
            raise ConfigError(f"run config: {_unknown(key, list(owner))}")
        _check_value(key, value)
        by_section[owner[key]][key] = value
    try:
        return Settings(
            **{name: SECTIONS[name].model_validate(by_section[name]) for name in SECTIONS}
        )
    except ValidationError as error:
        raise ConfigError(f"run config: {one_line(error)}") from None


def _check_value(key: str, value: object) -> None:
    if value == "auto" and not key.endswith("-device") and key in paper_settings():
        raise ConfigError(
            f"run config: '{key}' = 'auto': leave it out for its default; the paper's values are "
            "the preset 'paper'"
        )
    if isinstance(value, int) and abs(value) > _MOST_NUMBER:
        raise ConfigError(f"run config: '{key}' does not fit 64 bits; give a smaller number")
    # Python takes one for a byte that is no UTF-8; neither pydantic nor a message can have it.
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise ConfigError(
            f"run config: '{key}' = {printable(repr(value), _MOST_CHARACTERS)}: input should be a "
            "valid string of Unicode"
        )


def _unknown(key: str, known: Sequence[str]) -> str:
    if key in _SUCCESSORS:
        return f"'{key}' is no longer a setting: give {_SUCCESSORS[key]}"
    close = difflib.get_close_matches(key, known, n=1)
    # A list of all would be a screen that hides the line.
    hint = f"did you mean '{close[0]}'?" if close else "docs/configuration.md has all keys"
    return f"unknown key '{printable(key, _MOST_CHARACTERS)}': {hint}"


_OF_ROWS: Mapping[str, object] = {
    "image-sources": "independent:2,evolved:1,bred:1",
    "random-shifts": False,
    "random-erasing": False,
}
"""What is otherwise of rows of a table."""


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
        set is off: give the strategy an ``evaluate_fn`` instead. (1, 1, F) are rows of F numbers,
        whose neighbours have nothing in common: what is asked about has independent values then,
        and clients' rows are neither moved nor covered.
    num_classes : int
        Number of classes K, with ``image_shape``.
    **given
        Other settings, with underscores: ``num_clients=5, alpha=0.1``.

    Raises
    ------
    ConfigError
        As in `from_run_config`, or if there are classes without a shape.

    Examples
    --------
    >>> settings = make_settings(image_shape=(3, 32, 32), num_classes=10, num_clients=5, q=4)
    >>> settings.queries.q, settings.run.num_clients, settings.data.dataset
    (4, 5, 'own')
    """
    if image_shape is None and num_classes:
        raise ConfigError(f"num_classes = {num_classes} needs image_shape: give both")
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
        config |= _OF_ROWS if image_shape[1] == 1 else {}
    return from_run_config(config | {kebab(name): value for name, value in given.items()})


def one_line(error: ValidationError) -> str:
    """Tell the first problem that pydantic found in one line, with the key as the user wrote it."""
    problem = error.errors(include_url=False)[0]
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if not problem["loc"]:
        return message
    shown = printable(repr(problem["input"]), _MOST_CHARACTERS)
    return f"'{problem['loc'][0]}' = {shown}: {message[0].lower()}{message[1:]}"


def differs_from_paper(settings: Settings) -> list[str]:
    """Return the keys for which a run of the paper's recipe has defaults, not the paper's values.

    Of another recipe, none. The preset `fedzge_flwr.config.presets.catalogue.PAPER` has them all.
    """
    if settings.run.recipe != "paper":
        return []
    paper = paper_settings()
    here, defaults = settings.to_run_config(), Settings().to_run_config()
    return [key for key, value in paper.items() if here[key] == defaults[key] != value]
