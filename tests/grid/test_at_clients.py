"""The central model on the clients' data, by the evaluation that a Flower app has already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fedzge_flwr import (
    FedZGE,
    FunctionBlackBox,
    evaluate_at_clients,
    fitted_scale,
    register_endpoints,
)
from fedzge_flwr import make_settings as settings_of
from tests.helpers.boxes import SHAPE, TINY, digits, train_a_little
from tests.helpers.inprocess import InProcessGrid
from tests.helpers.small_models import mlp
from tests.helpers.snippets import ADOPTING, snippets_of

SETTINGS = settings_of(**TINY)
IMAGES = digits()


def rows_of(part: int) -> slice:
    return slice(part * 50, part * 50 + 50 * (part + 1))


def accuracy_of(model: nn.Module, part: int) -> float:
    rows = rows_of(part)
    found = model.eval()(torch.from_numpy(IMAGES.inputs_NCHW[rows])).argmax(dim=1).numpy()
    return float((found == IMAGES.labels_N[rows]).mean())


def no_more(model: nn.Module, part: int) -> dict[str, list[float]]:
    return {}


def app_of(
    seen: list[dict[str, object]],
    name: str = "eval_acc",
    more: Callable[[nn.Module, int], dict[str, list[float]]] = no_more,
) -> ClientApp:
    app = ClientApp()
    weights = mlp(SHAPE, 10)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        model = mlp(SHAPE, 10)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
        seen.append(dict(message.content["config"]))  # type: ignore[arg-type]
        part = int(context.node_config["partition-id"])
        metrics = {name: accuracy_of(model, part), "num-examples": 50 * (part + 1)}
        record = MetricRecord({**metrics, **more(model, part)})
        return Message(content=RecordDict({"metrics": record}), reply_to=message)

    def linear(images: object) -> object:
        with torch.no_grad():
            return weights(torch.tensor(images)).numpy()

    register_endpoints(app, lambda context: FunctionBlackBox(context, linear, SHAPE, 10, 20))  # type: ignore[arg-type]
    return app


def test_the_apps_own_evaluation_scores_the_central_model() -> None:
    """By the clients' numbers of images, in the rounds that are evaluated, and as the run's own."""
    seen: list[dict[str, object]] = []
    central = mlp(SHAPE, 10)
    grid = InProcessGrid(app_of(seen), {}, 2)
    strategy = FedZGE(SETTINGS, central)
    result = strategy.start(
        grid,
        ArrayRecord(central.state_dict()),
        evaluate_fn=evaluate_at_clients(grid, config=ConfigRecord({"batch-size": 7})),
    )
    assert list(result.evaluate_metrics_serverapp) == [0, 1, 2]
    wanted = (accuracy_of(central, 0) * 50 + accuracy_of(central, 1) * 100) / 150
    last = result.evaluate_metrics_serverapp[2]
    assert last["accuracy"] == pytest.approx(wanted)
    assert last["eval_acc"] == pytest.approx(wanted)
    assert [config["server-round"] for config in seen] == [0, 0, 1, 1, 2, 2]
    assert {config["batch-size"] for config in seen} == {7}


def test_another_strategys_evaluation() -> None:
    seen: list[dict[str, object]] = []
    grid = InProcessGrid(app_of(seen, "score"), {}, 2)
    one = FedAvg(fraction_evaluate=0.5, min_evaluate_nodes=1, min_available_nodes=1)
    evaluate = evaluate_at_clients(grid, one)
    found = evaluate(3, ArrayRecord(mlp(SHAPE, 10).state_dict()))
    assert found is not None
    assert "score" in found
    assert "accuracy" not in found
    assert len(seen) == 1


def test_clients_that_cannot_are_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """A run need not end because nobody evaluates."""
    app = ClientApp()
    register_endpoints(app, lambda context: FunctionBlackBox(context, len, SHAPE, 10, 20))  # type: ignore[arg-type]
    grid = InProcessGrid(app, {}, 2)
    assert evaluate_at_clients(grid)(1, ArrayRecord(mlp(SHAPE, 10).state_dict())) is None
    assert "round 1: no client evaluated the central model" in caplog.text


def test_the_central_model_as_sure_as_clients_labels_say() -> None:
    """The guide's own lines, in a federation: the scale is that of all clients' images together."""
    names: dict[str, Any] = {}
    exec(compile(snippets_of(ADOPTING)["scale"], "adopting.md: scale", "exec"), names)

    def by_scale(model: nn.Module, part: int) -> dict[str, list[float]]:
        images = torch.tensor(IMAGES.inputs_NCHW[rows_of(part)])
        labels = torch.tensor(IMAGES.labels_N[rows_of(part)])
        return {"by-scale": names["losses"](model, images, labels)}

    torch.manual_seed(0)
    central = mlp(SHAPE, 10)
    train_a_little(central)
    grid = InProcessGrid(app_of([], more=by_scale), {}, 2)
    arrays = ArrayRecord(central.state_dict())
    result = FedZGE(SETTINGS, central).start(grid, arrays, evaluate_fn=evaluate_at_clients(grid))
    surer = names["as_sure_as_right"](central, result)
    images = torch.tensor(IMAGES.inputs_NCHW[:150])
    with torch.no_grad():
        logits, scaled = central.eval()(images), surer.eval()(images)
    wanted = fitted_scale(logits.numpy(), IMAGES.labels_N[:150])
    assert 0.3 < wanted < 50
    assert (scaled / logits).mean() == pytest.approx(wanted, rel=0.1)
