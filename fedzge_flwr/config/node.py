"""What a node's owner says in the node's own config: one frozen, validated view of it.

It comes with ``flower-supernode --node-config "key=value ..."``, from nobody else, and in no
message. Other apps may share the node, so keys that this one does not know are left alone, unless
they look like a misspelling of one that it does.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Annotated

from pydantic import Field, ValidationError

from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.config.sections import Section, Settings

_ALIKE = 0.8
"""Likeness (`difflib`) from which a key is taken for a misspelling."""


class NodeSettings(Section):
    """The node config; a key's description says what to give, in errors too."""

    partition_id: Annotated[int, Field(ge=0)] = Field(
        description="this node a number from 0 (flower-supernode --node-config "
        '"partition-id=0 num-partitions=2")'
    )
    num_partitions: int = Field(description="a number: how many clients the federation has")
    model: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="the name of a model, for the run's own"
    )
    data_path: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="a folder of images by class, or an .npz file, of the owner's"
    )
    rehearsal: bool | None = Field(
        None,
        description="true or false: whether own images are rehearsed in distillation, for the "
        "run's client-rehearsal",
    )
    dp_epsilon: Annotated[float, Field(gt=0, le=100)] | None = Field(
        None,
        description="a number above 0, at most 100: ε of what may ever leave the node of its "
        "images, for each of them; it then has the model gabor-linear, trained on them once",
    )
    dp_delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-5, description="a number between 0 and 1: δ of dp-epsilon, below 1 ÷ the images"
    )
    dp_told: bool = Field(
        False, description="true or false: whether the server is told dp-epsilon and dp-delta"
    )


def from_node_config(node_config: Mapping[str, object], settings: Settings) -> NodeSettings:
    """Parse a node's config.

    Parameters
    ----------
    node_config : Mapping[str, object]
        Flower's node config, with kebab-case keys.
    settings : Settings
        The run's settings; ``num-partitions`` is ``num-clients`` where it is not given.

    Raises
    ------
    ConfigError
        If the node lacks its partition, a value is of the wrong type or out of range, or a key
        looks misspelt; one line that names the key and the fix.
    """
    fields = {field.alias: field for field in NodeSettings.model_fields.values() if field.alias}
    refuse_misspelt(node_config, fields)
    given = {key: value for key, value in node_config.items() if key in fields}
    given.setdefault("num-partitions", settings.run.num_clients)
    try:
        return NodeSettings.model_validate(given)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = str(problem["loc"][0])
        fix = f"give {fields[key].description}"
        if problem["type"] == "value_error":
            fix = problem["msg"].removeprefix("Value error, ")
        raise ConfigError(f"node config: '{key}' = {node_config.get(key)!r}: {fix}") from None


def rehearses(node_config: Mapping[str, object], settings: Settings) -> bool:
    """Return whether own images are rehearsed in distillation: as the owner says, else the run.

    Raises
    ------
    ConfigError
        If what the owner says is neither true nor false.
    """
    value = node_config.get("rehearsal")
    if value is None:
        return settings.distillation.client_rehearsal
    if not isinstance(value, bool):
        raise ConfigError(f"node config: 'rehearsal' = {value!r}: give true or false")
    return value


def refuse_misspelt(node_config: Mapping[str, object], known: Collection[str]) -> None:
    """Refuse a key that looks like a known one that is not there.

    Raises
    ------
    ConfigError
        If there is one; it names both.
    """
    missing = [key for key in known if key not in node_config]
    for key in node_config:
        close = difflib.get_close_matches(key, missing, n=1, cutoff=_ALIKE)
        if key not in known and close:
            raise ConfigError(f"node config: unknown key '{key}': did you mean '{close[0]}'?")
