"""The black box of a node, as its owner and the run's settings have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedzge_flwr.black_boxes.partition import TorchBlackBox, cap_memory, gpu_share
from fedzge_flwr.black_boxes.private import PRIVATE_MODEL, PrivateBlackBox, Releases
from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.common.node_folder import NODE_FOLDER
from fedzge_flwr.common.reading import place
from fedzge_flwr.config.node import NodeSettings, from_node_config
from fedzge_flwr.config.owner import STATE_DIR_VARIABLE, owner_settings
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.learning.models.catalogue import MODELS
from fedzge_flwr.learning.numerics import select_device

if TYPE_CHECKING:
    from flwr.app import Context


def torch_black_box(context: Context, settings: Settings | None = None) -> TorchBlackBox:
    """Make the black box of the node that a Flower ``Context`` belongs to.

    Parameters
    ----------
    context : Context
        Its node config has what the node's owner says (``partition-id``, ``model``, ``data-path``,
        ``dp-epsilon`` …).
    settings : Settings, optional
        The run's; by default those that the context's run config holds, which may then have no
        other keys.

    Raises
    ------
    ConfigError
        If a setting of the run or of the node is wrong or missing.
    """
    if settings is None:
        settings = from_run_config(context.run_config)
    node = from_node_config(context.node_config, settings)
    model_name = node.model
    if model_name is not None and model_name not in MODELS:
        known = ", ".join(sorted(MODELS))
        raise ConfigError(f"node config: 'model' = '{model_name}': no such model; known: {known}")
    if node.partition_id >= settings.run.num_clients and model_name is None:
        # Refused by the server; any model will do until then.
        model_name = settings.training.model_of(0)
    cap_memory(select_device(settings.run.client_device), gpu_share())
    state_dir = str(context.node_config.get("state-dir", ""))
    if node.dp_epsilon is not None:
        return PrivateBlackBox(
            settings,
            node.partition_id,
            node.num_partitions,
            _releases(node.dp_epsilon, node, context.node_config),
            node.data_path,
            state_dir=state_dir,
        )
    return TorchBlackBox(
        settings,
        node.partition_id,
        node.num_partitions,
        model_name,
        node.data_path,
        node.rehearsal,
        state_dir=state_dir,
    )


def _releases(epsilon: float, node: NodeSettings, node_config: Mapping[str, object]) -> Releases:
    """Return what a private node's images may be looked at for."""
    if node.model not in (None, PRIVATE_MODEL):
        raise ConfigError(
            f"node config: 'model' = '{node.model}' has no private training: remove 'dp-epsilon', "
            f"or give '{PRIVATE_MODEL}'"
        )
    if node.rehearsal:
        raise ConfigError(
            "node config: 'rehearsal' = True looks at own images again: remove it, or 'dp-epsilon'"
        )
    state_dir = owner_settings(node_config).state_dir
    if not state_dir:
        raise ConfigError(
            f"node config: 'dp-epsilon' = {epsilon} needs a 'state-dir' (or "
            f"{STATE_DIR_VARIABLE}): a restart would look at the images again"
        )
    folder = place(state_dir, "state-dir") / NODE_FOLDER / "private"
    return Releases(epsilon, node.dp_delta, folder, told=node.dp_told)
