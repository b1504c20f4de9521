from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.config.parsing import differs_from_paper, from_run_config, make_settings
from fedzge_flwr.config.presets.catalogue import PAPER, preset_file, read_settings
from fedzge_flwr.config.sections import Settings
from tests.helpers.paths import ROOT

PAPER_VALUES = read_settings(preset_file(PAPER))


def test_pyproject_holds_every_key_at_its_default() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert pyproject["tool"]["flwr"]["app"]["config"] == Settings().to_run_config()
    assert from_run_config({}) == Settings()


def test_published_hyperparameters_are_those_of_the_preset() -> None:
    settings = from_run_config(PAPER_VALUES)
    images, queries, optimizer = settings.images, settings.queries, settings.optimizer
    training, distillation = settings.training, settings.distillation
    assert (settings.run.recipe, settings.run.transport) == ("paper", "dense")
    assert (settings.run.num_clients, settings.run.fraction_train) == (10, 1.0)
    assert (training.local_epochs, distillation.central_distill_steps) == (10, 10)
    assert (training.batch_size, training.local_lr, distillation.central_lr) == (256, 0.01, 0.01)
    assert (images.generator_lr, images.synthetic_batch_size, images.latent_dim) == (1e-3, 500, 100)
    assert (images.beta1, images.beta2, images.beta3) == (1.0, 1.0, 1.0)
    assert (distillation.temperature, images.generator_width) == (5.0, 64)
    assert (queries.q, queries.eps, queries.differences) == (5, 1e-3, "forward")
    assert (distillation.client_distill_steps, distillation.client_distill_lr) == (3, 2e-5)
    assert (optimizer.optimizer, optimizer.lr_schedule) == ("adam", "cosine")
    assert (settings.data.partition, settings.data.alpha) == ("dirichlet", 1.0)


def test_the_recipe_names_phases_and_the_preset_has_the_values() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    whole = pyproject["tool"]["flwr"]["app"]["config"]
    phases_alone = from_run_config({**whole, "recipe": "paper"}).to_run_config()
    assert phases_alone == {**whole, "recipe": "paper"}
    paper = from_run_config({**whole, **PAPER_VALUES}).to_run_config()
    assert paper == {**whole, **PAPER_VALUES}
    for key, value in PAPER_VALUES.items():
        assert whole[key] != value, f"{key}: no need to have it in the preset"
    # What is given beside the preset is kept.
    assert from_run_config({**PAPER_VALUES, "local-epochs": 4}).training.local_epochs == 4


def test_what_a_paper_run_lacks_of_the_papers_values() -> None:
    others = [key for key in PAPER_VALUES if key != "recipe"]
    assert differs_from_paper(from_run_config({"recipe": "paper"})) == others
    assert differs_from_paper(from_run_config(PAPER_VALUES)) == []
    assert differs_from_paper(from_run_config({})) == []
    # A value of one's own is meant; the default's is not known to be.
    own = from_run_config({**PAPER_VALUES, "q": 7, "eps": 0.1})
    assert differs_from_paper(own) == ["eps"]


@pytest.mark.parametrize("transport", ["compact", "dense"])
def test_either_transport_goes_with_either_recipe(transport: str) -> None:
    for config in ({}, PAPER_VALUES):
        assert from_run_config({**config, "transport": transport}).run.transport == transport
    assert from_run_config({}).run.transport == "compact"


@pytest.mark.parametrize(
    ("old", "value"), [("wire", "dense"), ("wire", "compact"), ("exchanges", "phases")]
)
def test_a_key_of_an_earlier_version_is_told_what_says_it_now(old: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_run_config({old: value})
    told = str(caught.value)
    assert re.search(f"'{old}' is no longer a setting: give 'transport' = \"compact\"", told), told
    assert "dense" in told
    assert "\n" not in told


def test_auto_is_for_devices_alone() -> None:
    """It once asked for the recipe's own default; the paper's values are a preset now."""
    for key in ("server-device", "client-device"):
        assert from_run_config({key: "auto"}) == Settings()
    assert from_run_config({"run-name": "auto"}).run.run_name == "auto"
    for key in PAPER_VALUES:
        with pytest.raises(ConfigError) as caught:
            from_run_config({key: "auto"})
        told = str(caught.value)
        assert told.startswith(f"run config: '{key}' = 'auto': leave it out"), told
        assert told.endswith("the preset 'paper'")
        assert "\n" not in told


def test_names_of_parts_are_not_looked_up() -> None:
    """Models, ensembles and the like are known where their registries are."""
    names = {
        "central-model": "resnet19",
        "local-models": "foo",
        "dataset": "imagenet",
        "ensemble": "vote",
        "estimator": "adjoint",
        "objective": "mine",
        "generator": "gan",
    }
    settings = from_run_config(names)
    assert names.items() <= settings.to_run_config().items()
    with pytest.raises(ConfigError, match="no data set named 'imagenet'; known: cifar10, "):
        _ = settings.data.spec


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
    assert settings.training.model_of(0) == "cnn"
    assert settings.training.model_of(1) == "resnet18"


def test_settings_are_frozen() -> None:
    settings = from_run_config({})
    with pytest.raises(ValidationError):
        settings.queries.q = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"learning-rate": 1.0}, "unknown key 'learning-rate': docs/configuration.md has all keys"),
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
        ({"local-models": "cnn,cnn"}, "'local-models' names 2 models for 'num-clients' = 10"),
        ({"dataset": "own", "num-classes": 3}, "'dataset' = 'own' needs 'image-shape'"),
        ({"dataset": "own", "image-shape": "3,8,8"}, "and 'num-classes', at least 2"),
        ({"dataset": "own", "image-shape": "0,8,8"}, "'image-shape' = '0,8,8': "),
        ({"image-shape": "3,8,8"}, "'image-shape' and 'num-classes' are those of digits"),
        ({"partition": "sorted"}, "'partition' = 'sorted': .*'dirichlet', 'iid' or"),
        ({"optimizer": "lion"}, "'optimizer' = 'lion': .*'adam' or 'sgd'"),
        ({"recipe": "best"}, "'recipe' = 'best': .*'efficient' or 'paper'"),
        ({"transport": "fast"}, "'transport' = 'fast': .*'compact' or 'dense'"),
        (
            {"generator-share": 0.0, "image-sources": "bred:0, patterns:0"},
            "'generator-share' or a share of 'image-sources' must be above 0",
        ),
        ({"image-sources": "bred"}, "'image-sources' = 'bred': give source:share, each "),
        ({"image-sources": "bred:much"}, "'image-sources' = 'bred:much': give source:share"),
        ({"image-sources": "bred:nan"}, "'image-sources' = 'bred:nan': give source:share"),
        ({"image-sources": "bred:inf"}, "'image-sources' = 'bred:inf': give source:share"),
        ({"image-sources": "bred:-1"}, 'share in 0 … 1000000000, e.g. "evolved:0.5,patterns:0.5"'),
        ({"image-sources": "bred:1e308,evolved:1e308"}, "share in 0 … 1000000000"),
        ({"image-sources": ":1"}, "'image-sources' = ':1': give source:share"),
        ({"image-sources": "bred:1,bred:2"}, "each source once"),
        ({"client-device": "tpu"}, "'client-device' = 'tpu'"),
        ({"min-clients": 5, "fraction-train": 0.4}, "'min-clients' = 5, .* is 4 a round"),
        ({"run-name": "../up"}, "'run-name' = '../up'"),
        ({"image-sources": "\ud800"}, r"'image-sources' = '\\ud800': input should be a valid str"),
        ({"dataset": "\ud800"}, r"'dataset' = '\\ud800': input should be a valid string"),
        ({"\ud800": 1}, r"unknown key '\\ud800'"),
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


def test_rows_of_a_table_are_not_images() -> None:
    """Of one pixel's height: neighbours have nothing in common. What is given stays as it is."""
    table = make_settings(image_shape=(1, 1, 30), num_classes=2)
    assert table.images.source_shares["independent"] > 0
    assert "procedural" not in table.images.source_shares
    assert not table.training.random_shifts
    assert not table.training.random_erasing
    given = make_settings(
        image_shape=(1, 1, 30), num_classes=2, image_sources="bred:1", random_shifts=True
    )
    assert given.images.source_shares == {"bred": 1.0}
    assert given.training.random_shifts
    image = make_settings(image_shape=(1, 30, 1), num_classes=2)
    assert image.images.image_sources == Settings().images.image_sources


@pytest.mark.parametrize("more", [{}, {"dataset": "own"}, {"dataset": "mnist"}])
def test_classes_without_a_shape_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="num_classes = 26 needs image_shape"):
        make_settings(num_classes=26, **more)


def test_a_file_of_settings_may_begin_with_a_mark_of_its_encoding(tmp_path: Path) -> None:
    """As editors of Windows save it."""
    (tmp_path / "p.toml").write_bytes(b"\xef\xbb\xbfseed = 1\r\n")
    assert read_settings(tmp_path / "p.toml") == {"seed": 1}
