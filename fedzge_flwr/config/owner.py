"""What the owner of a node decides about its endpoints, in the node's own config.

These keys hold for every black box, and the endpoints read them; those of
`fedzge_flwr.config.node` say what the PyTorch one is made of.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.common.reading import place
from fedzge_flwr.config.node import refuse_misspelt
from fedzge_flwr.config.parsing import one_line
from fedzge_flwr.config.sections import CountOrNone, NonNegative, Section, kebab

STATE_DIR_VARIABLE = "FEDZGE_STATE_DIR"


class OwnerSettings(Section):
    """Where a client keeps its state, and the guards of its endpoints. Nothing of it is sent."""

    state_dir: str = Field(
        "",
        description="folder that keeps the client's model through restarts and resumed runs; "
        f"default: the environment's {STATE_DIR_VARIABLE}; empty: kept while the node runs",
    )
    max_query_images: CountOrNone = Field(
        0, description="most images of one query, perturbed copies included; 0: any number"
    )
    query_range: NonNegative = Field(
        0.0, description="largest magnitude of a pixel asked about; 0: any (images are in ±1)"
    )
    query_budget: CountOrNone = Field(
        0,
        description="most images answered, evaluations included, in all experiments together that "
        "use this state-dir; 0: any number",
    )
    min_query_interval: NonNegative = Field(
        0.0, description="fewest seconds between two queries, of whatever experiment; 0: none"
    )
    allow_evaluation: Literal["any", "held-out", "none"] = Field(
        "any",
        description="what the server may have the model evaluated on: the common test set too, "
        "whose logits it may ask for, own held-out images alone, or nothing",
    )
    logit_decimals: Annotated[int, Field(ge=-1, le=8)] = Field(
        -1, description="decimals that logits are rounded to; -1: not rounded"
    )
    logit_noise: NonNegative = Field(
        0.0,
        description="standard deviation of noise added to logits: the same for the same image, as "
        "long as the model is the same",
    )
    label_only: bool = Field(
        False,
        description="whether an answer is the likeliest class alone: logits that give it a "
        "probability of 0.9, and all others the same",
    )
    max_trainings: CountOrNone = Field(
        0,
        description="rounds of local training in an experiment, those included that the server "
        "went back behind, after which the model trains no more; 0: any number",
    )
    max_catch_up_rounds: CountOrNone = Field(
        10, description="most missed rounds of local training made up for in one message"
    )
    allow_distillation: bool = Field(
        True, description="whether the model distills what the server says the others know"
    )
    max_accuracy_loss: Annotated[float, Field(ge=0, le=100)] = Field(
        5.0,
        description="points of accuracy on own images, below the best so far, that distillation "
        "may cost before it is undone; 100: any",
    )
    max_states: CountOrNone = Field(
        32,
        description="most states of the model kept in an experiment until no checkpoint of the "
        "server's needs them; the oldest go first; 0: any number",
    )
    max_experiments: CountOrNone = Field(
        50,
        description="most experiments whose states are kept in state-dir; that which has rested "
        "longest goes first, if for a day at least; else a new one is refused; 0: any number",
    )

    @model_validator(mode="after")
    def _a_budget_is_written_down(self) -> OwnerSettings:
        if self.query_budget and not self.state_dir:
            raise ValueError(
                f"'query-budget' = {self.query_budget} needs a 'state-dir' (or {STATE_DIR_VARIABLE}"
                "): a restart would forget how much has been spent"
            )
        return self

    @model_validator(mode="after")
    def _a_path(self) -> OwnerSettings:
        place(self.state_dir, "state-dir")
        if "\0" in self.state_dir:
            raise ValueError(f"'state-dir' = {self.state_dir!r} has a null character")
        return self


def owner_settings(
    node_config: Mapping[str, object], environment: Mapping[str, str] = os.environ
) -> OwnerSettings:
    """Read the owner's keys from a node config; others are not looked at.

    Parameters
    ----------
    node_config : Mapping[str, object]
        ``context.node_config``.
    environment : Mapping[str, str]
        Its ``FEDZGE_STATE_DIR`` is the default of ``state-dir``; a simulation's workers inherit it.

    Raises
    ------
    ConfigError
        If a value is of the wrong type or out of range, or a key looks misspelt.
    """
    keys = {kebab(name) for name in OwnerSettings.model_fields}
    refuse_misspelt(node_config, keys)
    given = {key: value for key, value in node_config.items() if key in keys}
    given.setdefault("state-dir", environment.get(STATE_DIR_VARIABLE, ""))
    try:
        return OwnerSettings.model_validate(given)
    except ValidationError as error:
        raise ConfigError(f"node config: {one_line(error)}") from None
