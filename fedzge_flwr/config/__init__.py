"""The settings of a run: one frozen, validated view of Flower's run config.

Every key is kebab-case and flat; `from_run_config` sorts the keys into the sections that the parts
of the system take. Some defaults depend on the recipe: `from_run_config` fills them in where a key
is absent or ``"auto"``. Those of ``recipe = "paper"`` are the published commands', except for the
data set, the models, the number of rounds and the output folder, which suit a quick first run.
What a node's owner sets for that node alone is `NodeSettings`.
"""

from __future__ import annotations

from fedzge_flwr.config.node import NodeSettings, from_node_config
from fedzge_flwr.config.parsing import (
    AUTO,
    NUMBERS_DO_NOT_DEPEND_ON,
    SECTIONS,
    default_run_config,
    from_run_config,
    make_settings,
    paper_defaults,
)
from fedzge_flwr.config.sections import (
    ClientSettings,
    DataSettings,
    OptimizerSettings,
    RunSettings,
    ServerSettings,
    Settings,
    TransferSettings,
)

__all__ = [
    "AUTO",
    "NUMBERS_DO_NOT_DEPEND_ON",
    "SECTIONS",
    "ClientSettings",
    "DataSettings",
    "NodeSettings",
    "OptimizerSettings",
    "RunSettings",
    "ServerSettings",
    "Settings",
    "TransferSettings",
    "default_run_config",
    "from_node_config",
    "from_run_config",
    "make_settings",
    "paper_defaults",
]
