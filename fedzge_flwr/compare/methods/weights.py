"""Methods that average weights: Flower's own FedAvg, FedProx and FedAdam, and FedDF."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg, FedProx, Strategy
from torch import Tensor, nn

from fedzge_flwr.compare.clients import Client
from fedzge_flwr.compare.method import Method, plain_steps_in_every_round
from fedzge_flwr.compare.session import Session

ARRAYS = "arrays"
"""The key under which Flower's strategies send weights, and expect them back."""

PROXIMAL_MU = 0.01
"""Of the grid {0.001, 0.01, 0.1, 1} of Li et al., 2020, arXiv 1812.06127, section 5.1."""

ADAM_RATE, ADAM_TAU = 0.01, 0.001
"""Within the grids of Reddi et al., 2021, arXiv 2003.00295, appendix D."""


def weights_of(model: nn.Module) -> ArrayRecord:
    """Return parameters and batch norm's statistics: what can be averaged."""
    return ArrayRecord({n: v for n, v in model.cpu().state_dict().items() if v.is_floating_point()})


def with_weights(model: nn.Module, arrays: ArrayRecord) -> nn.Module:
    """Load what `weights_of` gave, or an average of it; return the model."""
    found = {name: array.numpy() for name, array in arrays.items()}
    state = model.state_dict()
    model.load_state_dict(
        {n: v.new_tensor(found[n]) if n in found else v for n, v in state.items()}
    )
    return model


@contextmanager
def proximal(model: nn.Module, mu: float) -> Iterator[None]:
    """Add the gradient of μ/2 · ‖w − w₀‖² to every step, w₀ the weights as they are now.

    The proximal term of FedProx (Li et al., 2020, arXiv 1812.06127, equation 2).
    """
    handles = [
        parameter.register_hook(partial(_pulled, parameter, parameter.detach().clone(), mu))
        for parameter in model.parameters()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pulled(parameter: nn.Parameter, start: Tensor, mu: float, gradient: Tensor) -> Tensor:
    return gradient + mu * (parameter.detach() - start)


def register_weights(app: ClientApp) -> None:
    """Register ``train``: weights come, are trained, and go back."""

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = Client.of(FEDAVG, context)
        given = message.content.config_records["config"]
        model = with_weights(client.central_model(), message.content.array_records[ARRAYS])
        with proximal(model, float(given.get("proximal-mu", 0.0))):  # type: ignore[arg-type]
            loss = client.train(model, int(given["server-round"]))  # type: ignore[arg-type]
        metrics = MetricRecord({"num-examples": len(client.images()), "train-loss": loss})
        return Message(
            RecordDict({ARRAYS: weights_of(model), "metrics": metrics}), reply_to=message
        )


def run_strategy(make: Any, session: Session) -> None:
    """Run a strategy of Flower's from the central model's first weights."""
    model = session.central_model()
    clients = session.settings.run.num_clients
    strategy: Strategy = make(
        fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
    )

    def evaluate_fn(round_: int, arrays: ArrayRecord) -> MetricRecord | None:
        with_weights(model, arrays)
        return session.evaluate_fn(round_, ArrayRecord(model.state_dict()))

    strategy.start(
        session.grid,
        weights_of(model),
        num_rounds=session.settings.run.num_server_rounds,
        evaluate_fn=evaluate_fn,
    )


class FedAdamOfParameters(FedAdam):
    """Flower's FedAdam; batch norm's statistics, which are no parameters, are averaged.

    Adam would move a running variance by its rate a round, below 0 too.
    """

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate as FedAdam does, and then put the averages of statistics in."""
        kept = list(replies)
        average, _ = FedAvg.aggregate_train(self, server_round, kept)
        arrays, metrics = super().aggregate_train(server_round, kept)
        if arrays is not None and average is not None:
            for name in arrays:
                if "running_" in name:
                    arrays[name] = average[name]
        return arrays, metrics


def _weights(title: str, source: str, make: Any) -> Method:
    return Method(
        title,
        partial(run_strategy, make),
        leaves="weights",
        source=source,
        several_architectures=False,
        client_keys=plain_steps_in_every_round,
        endpoints=register_weights,
    )


FEDAVG = _weights("FedAvg", "McMahan et al., 2017, arXiv 1602.05629", FedAvg)
FEDPROX = _weights(
    "FedProx", "Li et al., 2020, arXiv 1812.06127", partial(FedProx, proximal_mu=PROXIMAL_MU)
)
FEDADAM = _weights(
    "FedAdam",
    "Reddi et al., 2021, arXiv 2003.00295",
    partial(FedAdamOfParameters, eta=ADAM_RATE, tau=ADAM_TAU),
)
