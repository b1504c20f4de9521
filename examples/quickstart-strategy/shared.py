"""What server and clients go by alike."""

from flwr.app import Context

from fedzge_flwr import Settings, make_settings


def settings(context: Context) -> Settings:
    """Return the run's settings."""
    clients = int(context.run_config["num-clients"])
    return make_settings(image_shape=(1, 8, 8), num_classes=10, num_clients=clients)
