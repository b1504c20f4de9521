"""What a client draws from: first values of its model, batches, augmentation."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from fedzge_flwr.common.node_folder import NODE_FOLDER, node_secret
from fedzge_flwr.common.reading import place
from fedzge_flwr.config.owner import owner_settings


def seed_of_draws(node_config: Mapping[str, object], run_seed: int) -> int:
    """Return the seed of all that a client draws in a run.

    The run's seed is the server's too: who knows the model's first values and its batches attacks
    it with less. A node whose own config names a ``state-dir`` draws from the secret that is kept
    there; the same run's again after a restart. Others draw from the run's seed, so that a
    simulation is the same each time: it is not private.

    Parameters
    ----------
    node_config : Mapping[str, object]
        The owner's keys. A ``state-dir`` of the environment's, as in a simulation, changes nothing.
    run_seed : int
        The run's.

    Raises
    ------
    ConfigError
        If one of the owner's keys is wrong.
    StateError
        If the secret can be neither read nor made.
    """
    state_dir = owner_settings(node_config, {}).state_dir
    if not state_dir:
        return run_seed
    secret = node_secret(place(state_dir, "state-dir") / NODE_FOLDER)
    return int.from_bytes(hmac.digest(secret, b"draws of run seed %d" % run_seed, "sha256"), "big")
