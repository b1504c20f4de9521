"""The endpoints of a client: decode, load the private model, act, keep it, answer.

`register_endpoints` puts them on any ``ClientApp``, given a factory of black boxes. The model stays
here between messages (`fedzge_flwr.client.store`) and leaves in no reply; a handler that finds none
starts from the black box's initial one. Whatever goes wrong, the server is told its kind alone
(`fedzge_flwr.client.failures`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedzge_flwr.black_boxes.contract import BlackBox
from fedzge_flwr.client import acts
from fedzge_flwr.client.account import open_account
from fedzge_flwr.client.failures import failure
from fedzge_flwr.client.guard import Guard
from fedzge_flwr.client.registrations import Registrations, register_again, registrations
from fedzge_flwr.client.store import open_store
from fedzge_flwr.client.visit import Visit
from fedzge_flwr.common.errors import RefusedError
from fedzge_flwr.common.text import printable
from fedzge_flwr.config.owner import owner_settings
from fedzge_flwr.wire.codec import MAX_STRING, decode, encode
from fedzge_flwr.wire.messages import (
    CompactDistillRequest,
    CompactLogitsRequest,
    DistillRequest,
    EvaluateRequest,
    HelloRequest,
    LogitsRequest,
    Refused,
    Reply,
    Request,
    RoundRequest,
    TrainRequest,
)

BlackBoxFactory: TypeAlias = Callable[[Context], BlackBox]


def register_endpoints(app: ClientApp, make_black_box: BlackBoxFactory) -> None:
    """Put FedZGE's endpoints on a ClientApp.

    Models, data sets and copies that have been registered by the time when Flower sends the app to
    the processes of a simulation are registered there, too.

    Parameters
    ----------
    app : ClientApp
        Gets the actions ``query.hello``, ``train.local``, ``query.logits``, ``train.distill``,
        ``train.round`` and ``evaluate.local``; other actions of it are left alone.
    make_black_box : Callable[[Context], BlackBox]
        Makes the black box of the node that the context belongs to. Called once for each message.
    """
    endpoints: dict[str, list[_Endpoint]] = {}
    for endpoint in _ENDPOINTS:
        endpoints.setdefault(endpoint.request_type.ACTION, []).append(endpoint)
    for action, choices in endpoints.items():
        category, name = action.split(".")
        register = {"train": app.train, "query": app.query, "evaluate": app.evaluate}[category]
        register(name)(_Handler(tuple(choices), make_black_box))


@dataclass(frozen=True)
class _Endpoint:
    """A type of request, and what answers it."""

    request_type: type[Request]
    act: Callable[[Visit, Any], Reply]


_ENDPOINTS = (
    _Endpoint(HelloRequest, acts.hello),
    _Endpoint(TrainRequest, acts.train),
    _Endpoint(LogitsRequest, acts.answer),
    _Endpoint(CompactLogitsRequest, acts.answer_compact),
    _Endpoint(DistillRequest, acts.distill),
    _Endpoint(CompactDistillRequest, acts.distill_compact),
    _Endpoint(RoundRequest, acts.take_part),
    _Endpoint(EvaluateRequest, acts.evaluate),
)


@dataclass(frozen=True)
class _Handler:
    """The handler of an action that takes requests of some types.

    Pickled, it takes along what has been registered (`fedzge_flwr.client.registrations`).
    """

    choices: tuple[_Endpoint, ...]
    make_black_box: BlackBoxFactory

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer; what goes wrong is raised as what may be told of it."""
        made: list[BlackBox] = []
        try:
            try:
                made.append(self.make_black_box(context))
                return Message(_replied(made[0], self.choices, message, context), reply_to=message)
            finally:
                for box in made:
                    box.close()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, it is not sent
            who = type(made[0]).__name__ if made else "the factory of black boxes"
            failed = failure(error, who, message.metadata.message_type)
        raise failed

    def __reduce__(self) -> tuple[Callable[..., _Handler], tuple[object, ...]]:
        """Give what makes it anew in another process."""
        return _made_anew, (self.choices, self.make_black_box, registrations())


def _made_anew(
    choices: tuple[_Endpoint, ...], make_black_box: BlackBoxFactory, found: Registrations
) -> _Handler:
    register_again(found)
    return _Handler(choices, make_black_box)


def _replied(
    box: BlackBox, choices: Sequence[_Endpoint], message: Message, context: Context
) -> RecordDict:
    """Decode a request and return the reply's content."""
    request = _decoded(box, choices, message)
    endpoint = next(one for one in choices if one.request_type is type(request))
    reply: Reply
    try:
        reply = _visit(box, endpoint, request, context)
    except RefusedError as error:
        reply = Refused(round=request.round, reason=printable(str(error), MAX_STRING - 1))
    return encode(reply)


def _decoded(box: BlackBox, choices: Sequence[_Endpoint], message: Message) -> Request:
    channels, height, width = box.image_shape
    most = box.max_query_images
    return decode(
        [choice.request_type for choice in choices],
        message.content,
        sender="server",
        dims={"C": channels, "H": height, "W": width, "K": box.num_classes},
        limits={**dict.fromkeys("BNGQST", most), "P": 4 * channels * height * width},
    )


def _visit(box: BlackBox, endpoint: _Endpoint, request: Request, context: Context) -> Reply:
    """Go on from the state that the server knows, answer, and keep what has become of it."""
    owner = owner_settings(context.node_config)
    client = context.node_config.get("partition-id", "")
    store = open_store(
        context.state, owner.state_dir, client, request.experiment, owner.max_experiments
    )
    began = store.load(request.state)
    if began.model is not None:
        box.load_state(began.model)
        if getattr(box, "begins_anew", False):
            # It answers from another model, and noise is drawn by the one that answers.
            began = replace(began, model=None)
    asked = store.load_asked()
    in_step = began.name == request.state
    guard = Guard(owner, open_account(context.state, owner.state_dir))
    visit = Visit(box, guard, store, began, asked, began.progress, in_step=in_step)
    reply = endpoint.act(visit, request)
    state = visit.keep() if visit.changed else began.name
    if visit.asked is not asked:
        store.keep_asked(visit.asked)
    store.forget_before(request.durable)
    if owner.max_states:
        store.keep_at_most(owner.max_states, spare=began.name)
    return replace(reply, began=began.name, state=state)
