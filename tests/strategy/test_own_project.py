"""The library in a project of one's own: settings, snippets of the documentation, going on."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedzge_flwr import (
    DATASETS,
    ENSEMBLES,
    ESTIMATORS,
    GENERATORS,
    MODELS,
    OBJECTIVES,
    SOURCES,
    BlackBox,
    FedZGE,
    FunctionBlackBox,
    ImageSet,
    ModuleBlackBox,
    Observer,
    RoundRow,
    make_settings,
    register_endpoints,
    torch_black_box,
)
from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.errors import ConfigError, RosterError
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.sections import (
    DataSettings,
    DistillationSettings,
    ImageSettings,
    OptimizerSettings,
    QuerySettings,
    RunSettings,
    Section,
    Settings,
    TrainingSettings,
    kebab,
)
from tests.helpers.boxes import QUERY, SHAPE, TINY
from tests.helpers.inprocess import InProcessGrid
from tests.helpers.paths import ROOT
from tests.helpers.running import rows_of, run_server
from tests.helpers.small_models import mlp
from tests.helpers.snippets import EXTENDING, README, SNIPPETS, run_snippet

pytestmark = pytest.mark.usefixtures("registries")


def context_of(run_config: dict[str, Any], partition: int = 1) -> Context:
    node = {"partition-id": partition, "num-partitions": 3}
    return Context(1, 2, node, RecordDict(), run_config)


def train(model: nn.Module) -> float:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(torch.from_numpy(QUERY)), torch.arange(7))
    loss.backward()
    optimizer.step()
    return loss.item()


class Reading:
    """Notes which of some settings' keys are read."""

    def __init__(self, settings: Settings, patch: pytest.MonkeyPatch) -> None:
        self.keys: set[str] = set()
        sections = {id(getattr(settings, name)): name for name in type(settings).model_fields}

        def noting(section: Section, name: str) -> Any:
            where = sections.get(id(section))
            if where and name in type(section).model_fields:
                self.keys.add(f"{where}:{kebab(name)}")
            return object.__getattribute__(section, name)

        patch.setattr(Section, "__getattribute__", noting)

    def of(self, *sections: str) -> set[str]:
        return {key.split(":")[1] for key in self.keys if key.split(":")[0] in sections}


def named_for(who: str) -> set[str]:
    """The keys in a row of the documentation's table of who reads what."""
    (row,) = re.findall(rf"^\| {re.escape(who)}.*", EXTENDING, re.MULTILINE)
    return set(re.findall(r"`([a-z-]+)`", row.split("|")[2]))


def test_what_settings_say_of_a_modules_distillation() -> None:
    """All that the documentation names, and nothing else, is read."""
    settings = make_settings(client_distill_steps=3, local_rounds=4, seed=1, num_clients=3)
    with pytest.MonkeyPatch.context() as patch:
        reading = Reading(settings, patch)
        box = ModuleBlackBox(
            context_of({}), mlp(SHAPE, 10), train, SHAPE, 10, 200, settings=settings
        )
        box.fit(1)
        box.distill(1, QUERY, box.logits(QUERY), 1.5)
        box.close()
        own = ImageSet.from_inputs(QUERY, np.arange(7))
        ModuleBlackBox(
            context_of({}), mlp(SHAPE, 10), None, SHAPE, 10, 7, own=own, settings=settings
        ).fit(1)
    assert box.local_rounds == 4
    all_but_the_optimizers = set(Settings.model_fields) - {"optimizer"}
    assert reading.of(*all_but_the_optimizers) == named_for("`ModuleBlackBox`")
    assert "optimizer" in reading.of("optimizer")


def test_distillation_is_as_the_settings_have_it() -> None:
    """As long, as fast, and drawn from the seed."""

    def distilled(**given: object) -> dict[str, Any]:
        torch.manual_seed(0)
        box = ModuleBlackBox(
            context_of({}),
            mlp(SHAPE, 10),
            train,
            SHAPE,
            10,
            200,
            settings=make_settings(client_distill_steps=3, distill_batch_size=4, **given),
        )
        box.distill(1, QUERY, np.eye(7, 10, dtype=np.float32), 1.5)
        return box.state()

    plain = distilled()
    for given in ({"seed": 1}, {"client_distill_lr": 0.1}, {"optimizer": "sgd"}):
        other = distilled(**given)
        assert not np.array_equal(plain["1.weight"], other["1.weight"]), given
    np.testing.assert_array_equal(plain["1.weight"], distilled()["1.weight"])


def test_the_runs_own_box_in_a_project_with_a_run_config_of_its_own() -> None:
    node = {"partition-id": 1, "num-partitions": 3}
    context = Context(1, 2, node, RecordDict(), {"learning-rate": 0.1})
    with pytest.raises(ConfigError, match="unknown key 'learning-rate'"):
        torch_black_box(context)
    settings = make_settings(num_clients=3, num_train_images=120)
    with closing(torch_black_box(context, settings)) as box:
        assert box.profile().partition == 1
        assert box.profile().num_examples > 0


def boxed(context: Context) -> ModuleBlackBox:
    torch.manual_seed(0)
    settings = make_settings(**TINY)
    return ModuleBlackBox(context, mlp(SHAPE, 10), train, SHAPE, 10, 7, settings=settings)


def app_of(factory: Callable[[Context], BlackBox]) -> ClientApp:
    app = ClientApp()
    register_endpoints(app, factory)
    return app


def even(images_NCHW: FloatArray) -> FloatArray:
    return np.zeros((len(images_NCHW), 10), dtype=np.float32)


def test_what_the_strategy_reads_of_the_settings() -> None:
    """The documentation's table is right, and there is no key that nobody reads."""
    found: set[str] = set()
    varied: tuple[tuple[dict[str, Any], Callable[[Context], BlackBox]], ...] = (
        ({}, boxed),
        # Clients that never train.
        ({}, lambda context: FunctionBlackBox(context, even, SHAPE, 10, 7)),
        ({"recipe": "paper"}, boxed),
        ({"transport": "dense", "lr_schedule": "step"}, boxed),
        ({"optimizer": "sgd", "too_few_clients": "skip", "min_clients": 2}, boxed),
    )
    for more, make in varied:
        settings = make_settings(**{**TINY, **more})
        central = mlp(SHAPE, 10)
        with pytest.MonkeyPatch.context() as patch:
            reading = Reading(settings, patch)
            strategy = FedZGE(settings, central)
            grid = InProcessGrid(app_of(make), {}, 2)
            strategy.start(
                grid,
                ArrayRecord(central.state_dict()),
                evaluate_fn=lambda *_: MetricRecord({"accuracy": 0.5}),
            )
        found |= reading.keys
    read = {key.split(":")[1] for key in found}
    elsewhere = named_for("this repository's `server_app.py` alone") | named_for("`RunFolder`")
    assert not read & elsewhere
    # Of these sections it reads what is named; of the others all, but what clients read alone.
    named = named_for("`FedZGE`")
    for section in (TrainingSettings, DistillationSettings):
        assert keys_of(section) & read == keys_of(section) & named
    assert keys_of(DataSettings) & read == {"dataset", "image-shape", "num-classes"}
    of_boxes = named_for("`ModuleBlackBox`") | named_for("`torch_black_box`")
    clients_alone = {"client-device", "client-threads", "query-batch-size"}
    assert clients_alone <= of_boxes - read
    # With checkpoints, and when a client is missing or has other images than before.
    rarely = {"checkpoint-every", "too-few-clients", "catch-up-rounds", "data-changes"}
    assert keys_of(RunSettings) - read <= elsewhere | rarely | clients_alone
    assert keys_of(QuerySettings) - read == clients_alone & keys_of(QuerySettings)
    assert keys_of(ImageSettings) | keys_of(OptimizerSettings) <= read


def keys_of(section: type[Section]) -> set[str]:
    return {kebab(name) for name in section.model_fields}


class Rows(Observer):
    """Keeps the rows of a run, and torch's number of threads in each round."""

    def __init__(self) -> None:
        self.rows: list[RoundRow] = []
        self.threads: list[int] = []

    def on_round(self, server: object, current: object, row: RoundRow) -> None:
        self.rows.append(row)
        self.threads.append(torch.get_num_threads())


def test_settings_shared_by_both_sides() -> None:
    """The documentation's snippet, in small, with a run config that is the project's own."""
    small = {key: value for key, value in TINY.items() if key not in SNIPPETS["settings"]}
    del small["image_shape"], small["num_classes"]
    names = run_snippet(
        "settings", ("make_settings(", f"make_settings(num_train_images=90, **{small}, ")
    )
    central, kept = mlp(SHAPE, 10), Rows()
    grid = InProcessGrid(names["app"], {"learning-rate": 0.1}, 3)
    strategy = FedZGE(names["SETTINGS"], central, observers=[kept])
    strategy.start(grid, ArrayRecord(central.state_dict()))
    assert [row.missing for row in kept.rows] == [(), ()]
    assert kept.threads == [4, 4]


def test_going_on_in_a_project_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after two of four rounds, it ends with the model of a run that was not."""
    monkeypatch.setenv("FEDZGE_STATE_DIR", str(tmp_path / "clients"))
    strategy = run_snippet("resume")["strategy"]
    settings = make_settings(**{**TINY, "num_server_rounds": 4})

    class Stop(Rows):
        def on_round(self, server: object, current: object, row: RoundRow) -> None:
            super().on_round(server, current, row)
            if row.round == stop_after:
                raise KeyboardInterrupt

    def start(folder: Path) -> tuple[list[int], dict[str, torch.Tensor] | None]:
        torch.manual_seed(1)
        central, kept = mlp(SHAPE, 10), Stop()
        made = strategy(settings, central, folder)
        made._observers = (kept,)
        grid = InProcessGrid(app_of(boxed), {}, 2)
        result = None
        with suppress(KeyboardInterrupt):
            result = made.start(grid, ArrayRecord(central.state_dict()))
        arrays = result.arrays.to_torch_state_dict() if result is not None else None
        return [row.round for row in kept.rows], arrays

    stop_after = 0
    rounds, whole = start(tmp_path / "whole")
    assert rounds == [1, 2, 3, 4]
    stop_after = 3
    assert start(tmp_path / "stopped") == ([1, 2, 3], None)
    stop_after = 0
    rounds, resumed = start(tmp_path / "stopped")
    # The round that was not saved is done again.
    assert rounds == [3, 4]
    assert whole is not None
    assert resumed is not None
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_going_on_with_a_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDZGE_STATE_DIR", str(tmp_path / "clients"))
    strategy = run_snippet("folder")["strategy"]

    def start(folder: Path, stop_after: int, resume: str = "") -> list[int]:
        placed = {"output_dir": str(folder.parent), "run_name": folder.name, "resume": resume}
        torch.manual_seed(1)
        central, rounds = mlp(SHAPE, 10), list[int]()

        def evaluate(round_: int, _: ArrayRecord) -> MetricRecord:
            rounds.append(round_)
            if round_ == stop_after:
                raise KeyboardInterrupt
            return MetricRecord({"accuracy": 0.5})

        made = strategy(make_settings(**{**TINY, "num_server_rounds": 4, **placed}), central)
        with suppress(KeyboardInterrupt):
            made.start(
                InProcessGrid(app_of(boxed), {}, 2),
                ArrayRecord(central.state_dict()),
                evaluate_fn=evaluate,
            )
        return rounds

    whole, stopped = tmp_path / "runs" / "whole", tmp_path / "runs" / "stopped"
    assert start(whole, stop_after=9) == [0, 1, 2, 3, 4]
    assert start(stopped, stop_after=3) == [0, 1, 2, 3]
    assert start(stopped, stop_after=9, resume=str(stopped)) == [3, 4]
    assert [row["round"] for row in rows_of(stopped)] == [1, 2, 3, 4]
    model = "central.safetensors"
    assert (stopped / model).read_bytes() == (whole / model).read_bytes()


def test_the_readmes_two_sides() -> None:
    """Its block for another project, in small, with what it leaves to the reader."""
    (block,) = re.findall(r"^```python\n(# common\.py.*?)^```", README, re.MULTILINE | re.DOTALL)
    common, server, client = re.split(r"^# (?:server|client)_app\.py.*$", block, flags=re.MULTILINE)
    shape = (3, 32, 32)
    torch.manual_seed(0)
    app = ClientApp()

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"eval_acc": 0.25, "num-examples": 4})
        return Message(content=RecordDict({"metrics": metrics}), reply_to=message)

    scope: dict[str, Any] = {
        "app": app,
        "model": mlp(shape, 10),
        "images": torch.rand(20, *shape) * 2 - 1,
        "labels": torch.arange(20) % 10,
        "ArrayRecord": ArrayRecord,
        "central_model": mlp(shape, 10),
        "grid": InProcessGrid(app, {}, 5),
    }
    small = {key: value for key, value in TINY.items() if f"{key}=" not in common}
    assert len(small) == len(TINY) - 3
    common = common.replace("make_settings(", f"make_settings(**{small}, ")
    for name, code in (("common", common), ("client_app", client), ("server_app", server)):
        exec(compile(code, f"README: {name}.py", "exec"), scope)
    result = scope["result"]
    assert list(result.evaluate_metrics_serverapp) == list(range(11))
    assert set(result.train_metrics_clientapp) == set(range(1, 11))
    assert "client_distillation" in result.train_metrics_clientapp[10]


@pytest.mark.parametrize("side", ["server", "clients"])
def test_a_model_that_one_side_alone_knows(
    side: str, make_grid: Any, efficient_config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever lacks it says so in one line: a server before any client starts."""
    run_snippet("model")
    config = {**efficient_config, "local-models": "linear"}

    def elsewhere(context: Context) -> BlackBox:
        linear = MODELS.pop("linear")
        try:
            return torch_black_box(context)
        finally:
            MODELS["linear"] = linear

    if side == "clients":
        MODELS.pop("linear")
        grid = make_grid(config)
        with pytest.raises(ConfigError, match=r"^no model named 'linear'; known: cnn, "):
            run_server(grid, config)
        assert grid.sent == []
    else:
        with pytest.raises(RosterError, match="the run's settings, cannot be used"):
            run_server(make_grid(config, app=app_of(elsewhere)), config)


@pytest.mark.parametrize(
    ("key", "value", "kind", "known"),
    [
        ("objective", "mine", "objective", OBJECTIVES),
        ("estimator", "mine", "estimator", ESTIMATORS),
        ("generator", "mine", "generator", GENERATORS),
        ("image-sources", "mine:1", "source of images", SOURCES),
        ("ensemble", "mine", "ensemble", ENSEMBLES),
        ("dataset", "mine", "data set", DATASETS),
        ("central-model", "mine", "model", MODELS),
        ("local-models", "mine", "model", MODELS),
        ("local-models", "cnn, cnn, mine", "model", MODELS),
    ],
)
@pytest.mark.parametrize("recipe", ["efficient", "paper"])
def test_what_the_server_lacks_is_named_before_a_client_is_asked(
    recipe: str,
    key: str,
    value: str,
    kind: str,
    known: dict[str, Any],
    make_grid: Any,
    efficient_config: dict[str, Any],
) -> None:
    """Settings take any name: the app looks it up first of all, and leaves no run folder."""
    config = {**efficient_config, "recipe": recipe, key: value}
    assert from_run_config(config).to_run_config()[key] == value
    grid = make_grid(config)
    message = re.escape(f"no {kind} named 'mine'; known: {', '.join(sorted(known))}")
    with pytest.raises(ConfigError, match=f"^{message}$"):
        run_server(grid, config)
    assert grid.sent == []
    assert not Path(config["output-dir"]).exists()


def test_a_typed_project(tmp_path: Path) -> None:
    """All that it plugs in is used; mypy --strict sees the same file."""
    from tests.helpers import typed_project

    losses = typed_project.Losses()
    grid = InProcessGrid(typed_project.client_app(), {}, 2)
    result = typed_project.run(grid, tmp_path / "checkpoints", losses)
    assert set(losses.by_round) == {1, 2}
    for loss in losses.by_round.values():
        assert loss["sharpness"] > 0
        assert loss["gradient_norm"] > 0
        parts = sum(loss[n] for n in ("fidelity", "adversarial", "diversity", "information"))
        assert loss["total"] == pytest.approx(parts - loss["sharpness"], rel=1e-6)
    assert set(result.evaluate_metrics_serverapp) == {0, 1, 2}
    assert "tests/helpers/typed_project.py" in (ROOT / "pyproject.toml").read_text()
    # It is finished: there is nothing left to do, and its metrics are still there.
    again = typed_project.run(grid, tmp_path / "checkpoints", typed_project.Losses())
    assert set(again.evaluate_metrics_serverapp) == {0, 1, 2}
