"""The errors that a user can cause; each is one line that names the thing and the fix."""

from fedzge_flwr.common.text import printable

_MOST_CHARACTERS = 4000


class FedZGEError(Exception):
    """Base of all errors of this package that a user, a node's owner or a peer can mend.

    As text it is one line of bounded length, whatever names and texts of others it quotes.
    """

    def __str__(self) -> str:
        return printable(super().__str__(), _MOST_CHARACTERS)


class ConfigError(FedZGEError, ValueError):
    """A setting is unknown, of the wrong type, or out of its range."""


class DataError(FedZGEError):
    """A data set is missing, malformed, or cannot be divided as asked."""


class MissingDataError(DataError):
    """The files of a data set are not there."""


class ProtocolError(FedZGEError, ValueError):
    """A message breaks the wire's rules.

    Parameters
    ----------
    sender : str
        Who sent the message, e.g. ``"node 1234"``.
    field : str
        The offending field, or ``"message"`` when it is the message as a whole.
    problem : str
        What is wrong with it; made one line of bounded length, since it quotes the sender.
    """

    def __init__(self, sender: str, field: str, problem: str) -> None:
        problem = printable(problem)
        super().__init__(f"{sender}: field '{field}': {problem}")
        self.sender = sender
        self.field = field
        self.problem = problem


class DivergenceError(FedZGEError):
    """A model's loss or parameters are no longer finite."""


class BlackBoxError(FedZGEError):
    """A client's own code, or that of its model's library, failed."""


class AnswerError(FedZGEError):
    """A client cannot give what was asked for, and may say why: the line names nothing of its own.

    Of other errors a server is told the kind alone.
    """


class OutputError(AnswerError, ConfigError):
    """A model returns something else than logits; the line names types and shapes alone."""


class RosterError(FedZGEError):
    """The connected nodes do not make up the federation that the settings describe."""


class TooFewClientsError(FedZGEError):
    """Fewer clients answered in a round than ``min-clients``."""


class ComparisonError(FedZGEError):
    """A method of a comparison cannot be run as asked, or a client of it failed."""


class AuditError(FedZGEError):
    """An audit cannot be made, or found more than its caller allows."""


class RunFolderError(FedZGEError, OSError):
    """The run folder cannot be made or written."""


class StateError(FedZGEError, OSError):
    """A client's state cannot be kept where its owner wants it."""


class RefusedError(FedZGEError):
    """A client's owner does not allow what was asked."""


class CheckpointError(FedZGEError, OSError):
    """A checkpoint cannot be written, read, or gone on from."""
