"""The methods by name."""

from __future__ import annotations

from importlib import import_module

from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.common.registry import Registry, lookup
from fedzge_flwr.compare.method import Method
from fedzge_flwr.compare.methods.alone import LOCAL, POOLED
from fedzge_flwr.compare.methods.averaged_logits import FD
from fedzge_flwr.compare.methods.public_logits import feddf, fedmd
from fedzge_flwr.compare.methods.synthetic_logits import FEDZGE, ONE_ROUND, PAPER_FEDZGE
from fedzge_flwr.compare.methods.weights import FEDADAM, FEDAVG, FEDPROX

METHODS: Registry[Method] = Registry(
    {
        "local": LOCAL,
        "pooled": POOLED,
        "fedavg": FEDAVG,
        "fedprox": FEDPROX,
        "fedadam": FEDADAM,
        "feddf": feddf("photographs"),
        "feddf-tenth": feddf("a tenth"),
        "fd": FD,
        "fedmd": fedmd("photographs"),
        "fedmd-tenth": fedmd("a tenth"),
        "one-round": ONE_ROUND,
        "fedzge-paper": PAPER_FEDZGE,
        "fedzge": FEDZGE,
    }
)
"""The methods, in the order in which they are shown."""


def method_named(name: str) -> Method:
    """Return a method by its name, or by ``module:ATTRIBUTE`` one from outside.

    Raises
    ------
    ConfigError
        If there is none.
    """
    if ":" not in name:
        return lookup(METHODS, name, "method")
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:
        raise ConfigError(
            f"method '{name}': {type(error).__name__}: {error}; give module:ATTRIBUTE of a Method"
        ) from error
    if not isinstance(found, Method):
        raise ConfigError(f"method '{name}' is a {type(found).__name__}; give a Method")
    return found
