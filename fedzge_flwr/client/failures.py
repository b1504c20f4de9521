"""What a server is told of a failure at a node: its kind, and nothing of the node's.

An exception's text may hold paths, values of the node's config, or data. It goes to the node's own
log, whole. Flower sends the text of whatever an endpoint raises, so that what is raised there is
made here.
"""

from __future__ import annotations

import logging

from fedzge_flwr.common.errors import (
    AnswerError,
    BlackBoxError,
    ConfigError,
    DataError,
    DivergenceError,
    FedZGEError,
    OutputError,
    ProtocolError,
    StateError,
)
from fedzge_flwr.common.text import printable
from fedzge_flwr.wire.codec import MAX_STRING

LOGGER = logging.getLogger("flwr.fedzge")

_LOG = "the node's own log says why"

_KINDS: tuple[tuple[type[Exception], str], ...] = (
    (ConfigError, f"its config, or the run's settings, cannot be used; {_LOG}"),
    (DataError, f"its images or its model's files cannot be used; {_LOG}"),
    (StateError, f"its state cannot be kept where its owner wants it; {_LOG}"),
    (
        DivergenceError,
        "the model diverged and is kept as it was before; lower 'local-lr' or 'client-distill-lr'",
    ),
)
"""What is told of each kind of error whose text may name something of the node's."""


def told(error: BaseException, who: str) -> str:
    """Return the line about an error that may leave the node, of at most `MAX_STRING` characters.

    Parameters
    ----------
    error : BaseException
        What went wrong.
    who : str
        The class of the black box, or what else failed.
    """
    # About the request, or what a model makes of it, and made of that alone.
    if type(error) in (ProtocolError, AnswerError, OutputError):
        return printable(str(error), MAX_STRING - 1)
    for kind, line in _KINDS:
        if isinstance(error, kind):
            return line
    return printable(f"{who} failed: {type(error).__name__}; {_LOG}", MAX_STRING - 1)


def failure(error: BaseException, who: str, doing: str) -> FedZGEError:
    """Write an error to the node's log, whole, and return the one to raise in its place.

    It must be raised after the error has been handled: a process of Ray's sends the text of what it
    was raised from, too.

    Parameters
    ----------
    error, who
        As for `told`.
    doing : str
        What was being done.
    """
    note(error, who, doing)
    if type(error) is ProtocolError:
        return ProtocolError(error.sender, error.field, error.problem)
    return BlackBoxError(told(error, who))


def note(error: BaseException, who: str, doing: str) -> None:
    """Write an error to the node's log: a line, with a traceback if it is not one of ours."""
    lines = str(error).splitlines() or [""]
    name = type(error).__name__
    trace = None if isinstance(error, FedZGEError) else error
    LOGGER.error("%s: %s: %s", doing, who, f"{name}: {lines[0]}".removesuffix(": "), exc_info=trace)
