from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
from pydantic import ValidationError

from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.config.parsing import default_run_config, from_run_config, paper_defaults
from fedzge_flwr.config.sections import Settings
from tests.helpers.paths import ROOT


def test_pyproject_holds_every_key_at_its_default() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert pyproject["tool"]["flwr"]["app"]["config"] == default_run_config()


def test_published_hyperparameters_are_the_paper_recipe_s_defaults() -> None:
    settings = from_run_config({"recipe": "paper"})
    server, client = settings.server, settings.client
    assert (settings.run.num_clients, settings.run.fraction_train) == (10, 1.0)
    assert (client.local_epochs, server.central_distill_steps) == (10, 10)
    assert (client.batch_size, client.local_lr, server.central_lr) == (256, 0.01, 0.01)
    assert (server.generator_lr, server.synthetic_batch_size, server.latent_dim) == (1e-3, 500, 100)
    assert (server.temperature, server.beta1, server.beta2, server.beta3) == (5.0, 1.0, 1.0, 1.0)
    assert (server.q, server.eps, server.generator_width) == (5, 1e-3, 64)
    assert (client.client_distill_steps, client.client_distill_lr) == (3, 2e-5)
    assert (settings.optimizer.optimizer, settings.optimizer.lr_schedule) == ("adam", "cosine")
    assert (settings.data.partition, settings.data.alpha) == ("dirichlet", 1.0)


def test_auto_asks_for_the_recipe_s_own_default() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    whole = pyproject["tool"]["flwr"]["app"]["config"]
    assert from_run_config(whole) == from_run_config({})
    paper = from_run_config({**whole, "recipe": "paper"})
    assert paper == from_run_config({"recipe": "paper"})
    assert {key: paper.to_run_config()[key] for key in paper_defaults()} == paper_defaults()
    for key, value in paper_defaults().items():
        assert from_run_config({}).to_run_config()[key] != value, f"{key}: no need to mark it"
    # What is given is kept, whatever the recipe.
    assert from_run_config({**whole, "recipe": "paper", "local-epochs": 4}).client.local_epochs == 4
    with pytest.raises(ConfigError, match="'alpha' = 'auto'"):
        from_run_config({"alpha": "auto"})


def test_round_trip() -> None:
    config = {
        "q": 7,
        "alpha": 1,
        "dataset": "mnist",
        "local-models": "cnn, resnet18",
        "num-clients": 2,
    }
    settings = from_run_config(config)
    assert from_run_config(settings.to_run_config()) == settings
    assert settings.client.model_of(0) == "cnn"
    assert settings.client.model_of(1) == "resnet18"


def test_settings_are_frozen() -> None:
    settings = from_run_config({})
    with pytest.raises(ValidationError):
        settings.server.q = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"learning-rate": 1.0}, "unknown key 'learning-rate'.*known: recipe, .*eps"),
        ({"tempreature": 1.0}, "unknown key 'tempreature': did you mean 'temperature'"),
        ({"q": 0}, "'q' = 0: .*greater than or equal to 1"),
        ({"q": 2.5}, "'q' = 2.5: .*valid integer"),
        ({"q": True}, "'q' = True: .*valid integer"),
        ({"eps": 0.0}, "'eps' = 0.0: .*greater than 0"),
        ({"eps": -1e-3}, "'eps' = -0.001: .*greater than 0"),
        ({"eps": float("nan")}, "'eps' = nan"),
        ({"eps": "small"}, "'eps' = 'small': .*valid number"),
        ({"temperature": 0.0}, "'temperature' = 0.0"),
        ({"alpha": 0.0}, "'alpha' = 0.0"),
        ({"fraction-train": 1.5}, "'fraction-train' = 1.5: .*less than or equal to 1"),
        ({"batch-size": 1}, "'batch-size' = 1"),
        ({"distill-batch-size": 1}, "'distill-batch-size' = 1: give 0, or at least 2"),
        ({"memory-size": 1}, "'memory-size' = 1: give 0, or at least 2"),
        ({"central-model": "resnet19"}, "'central-model' = 'resnet19': no model .*; known: cnn, "),
        (
            {"local-models": "cnn,foo"},
            "'local-models' = 'cnn,foo': no model named 'foo'; known: cnn",
        ),
        ({"local-models": "cnn,cnn"}, "'local-models' names 2 models for 'num-clients' = 10"),
        ({"dataset": "imagenet"}, "no data set named 'imagenet'; known: cifar10, "),
        ({"dataset": "own", "num-classes": 3}, "'dataset' = 'own' needs 'image-shape'"),
        ({"dataset": "own", "image-shape": "3,8,8"}, "and 'num-classes', at least 2"),
        ({"dataset": "own", "image-shape": "0,8,8"}, "'image-shape' = '0,8,8': "),
        ({"image-shape": "3,8,8"}, "'image-shape' and 'num-classes' are those of digits"),
        ({"partition": "sorted"}, "'partition' = 'sorted': .*'dirichlet', 'iid' or"),
        ({"optimizer": "lion"}, "'optimizer' = 'lion': .*'adam' or 'sgd'"),
        ({"recipe": "best"}, "'recipe' = 'best': .*'efficient' or 'paper'"),
        ({"wire": "dense"}, "'wire' = 'dense' goes with 'exchanges' = 'phases'"),
        ({"ensemble": "vote"}, "'ensemble' = 'vote': no ensemble .*known: class-tendency, "),
        (
            {"generator-share": 0.0, "search-share": 0.0, "procedural-share": 0.0},
            "one of 'generator-share', 'search-share' and 'procedural-share'",
        ),
        ({"client-device": "tpu"}, "'client-device' = 'tpu'"),
        ({"min-clients": 5, "fraction-train": 0.4}, "'min-clients' = 5, .* is 4 a round"),
        ({"run-name": "../up"}, "'run-name' = '../up'"),
        ({"output-dir": ""}, "'output-dir' = ''"),
    ],
)
def test_bad_settings_are_one_clear_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_run_config(config)
    text = str(caught.value)
    assert re.search(message, text), text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("fraction", "num_clients", "participants"),
    [(1.0, 10, 10), (0.1, 10, 1), (0.11, 10, 2), (0.001, 10, 1), (0.07, 100, 7), (1 / 3, 3, 1)],
)
def test_participants_are_the_ceiling(fraction: float, num_clients: int, participants: int) -> None:
    settings: Settings = from_run_config({"fraction-train": fraction, "num-clients": num_clients})
    assert settings.run.participants == participants


def test_every_setting_is_described() -> None:
    for section in Settings.model_fields.values():
        for name, field in section.annotation.model_fields.items():  # type: ignore[union-attr]
            assert field.description, name
