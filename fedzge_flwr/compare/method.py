"""What a method is: what leaves a client, which settings it takes, what the server does.

A method lies in one file: what its server does with a `Session`, the endpoints that its clients
need beside FedZGE's, and the settings in which it differs. ``METHODS`` of
`fedzge_flwr.compare.catalogue` has those of the package; one from outside is named
``module:ATTRIBUTE``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from flwr.clientapp import ClientApp

from fedzge_flwr.compare.plan import Plan
from fedzge_flwr.config.sections import Settings

if TYPE_CHECKING:
    from fedzge_flwr.compare.session import Session

Keys: TypeAlias = Mapping[str, Any]
"""Settings by kebab-case key."""

Figure: TypeAlias = Literal["central", "mean client"]


def no_keys(_settings: Settings) -> Keys:
    """Return no settings: the run's are taken."""
    return {}


def no_client_keys(_settings: Settings, _plan: Plan) -> Keys:
    """Return no settings: the run's are taken."""
    return {}


def steps_in_every_round(_settings: Settings, plan: Plan) -> Keys:
    """Return the keys of a client that takes all its steps on own images, in every round alike."""
    epochs = plan.epochs(plan.total, plan.rounds)
    return {"local-rounds": 0, "local-epochs": epochs, "min-local-steps": 0}


def plain_steps_in_every_round(settings: Settings, plan: Plan) -> Keys:
    """Return the same of a client that trains on its images as they are.

    Mixed, moved and covered images, by which the clients of FedZGE answer better, cost an average
    of weights 14 points on uneven data (`docs/evidence.md`). The loss stays that of all methods,
    corrected for the client's classes, by which the average gains two.
    """
    plain = {"mixup": False, "random-shifts": False, "random-erasing": False}
    return {**steps_in_every_round(settings, plan), **plain}


def no_endpoints(_app: ClientApp) -> None:
    """Register nothing: FedZGE's endpoints are there."""


@dataclass(frozen=True)
class Method:
    """A way to learn from several parties, as one run of it is made and told.

    Parameters
    ----------
    title : str
        Its name in tables.
    run : Callable[[Session], None]
        What the server does, from the first round to the last.
    leaves : str
        What leaves a client.
    source : str
        Where it was published, or who built it.
    figure : {"central", "mean client"}
        Which accuracy is what a user would deploy.
    several_architectures : bool
        Whether clients may have models of several architectures.
    public_data : bool
        Whether it needs public images.
    keys : Callable[[Settings], Keys]
        The settings in which its runs differ from FedZGE's, which are given.
    client_keys : Callable[[Settings, Plan], Keys]
        The same of a client, by FedZGE's settings and the client's plan.
    endpoints : Callable[[ClientApp], None]
        Registers what its clients answer, beside FedZGE's endpoints.
    """

    title: str
    run: Callable[[Session], None]
    leaves: str
    source: str
    figure: Figure = "central"
    several_architectures: bool = True
    public_data: bool = False
    keys: Callable[[Settings], Keys] = no_keys
    client_keys: Callable[[Settings, Plan], Keys] = no_client_keys
    endpoints: Callable[[ClientApp], None] = no_endpoints
