"""The documentation: its snippets run, its tables are the code's, its links lead somewhere."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from safetensors.torch import load_file

from fedzge_flwr import (
    ENSEMBLES,
    OBJECTIVES,
    Answers,
    ClientEvaluation,
    FedZGE,
    Memories,
    make_settings,
)
from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.config.node import NodeSettings
from fedzge_flwr.config.owner import OwnerSettings
from fedzge_flwr.config.parsing import SECTIONS
from fedzge_flwr.config.reference import app_config, reference
from fedzge_flwr.config.sections import kebab
from tests.helpers.inprocess import InProcessGrid
from tests.helpers.pages import DOCS, PAGES
from tests.helpers.paths import ROOT
from tests.helpers.running import folder_of, rows_of, run_server
from tests.helpers.small_models import mlp
from tests.helpers.snippets import SNIPPETS, run_snippet

pytestmark = pytest.mark.usefixtures("registries")


def test_every_snippet_is_short_and_tested() -> None:
    assert set(SNIPPETS) == {
        *(
            "model",
            "dataset",
            "generator",
            "source",
            "objective",
            "estimator",
            "ensemble",
            "settings",
            "resume",
            "folder",
            "defence",
            "blackbox",
            "observer",
            "tracker",
        )
    }
    for name, text in SNIPPETS.items():
        assert len([line for line in text.splitlines() if line.strip()]) < 20, name


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("model", {"local-models": "linear", "central-model": "linear"}),
        ("generator", {"generator": "flat"}),
        ("source", {"image-sources": "stripes:0.5,evolved:0.5"}),
        ("objective", {"objective": "smooth"}),
        ("estimator", {"estimator": "normalised"}),
        ("ensemble", {"ensemble": "surest"}),
    ],
)
def test_what_is_registered_takes_part(
    name: str, settings: dict[str, Any], make_grid: Any, efficient_config: dict[str, Any]
) -> None:
    run_snippet(name)
    config = {**efficient_config, **settings}
    rows = rows_of(run_server(make_grid(config), config))
    assert [row["missing"] for row in rows] == [[], []]


def test_the_objective_is_what_the_generator_minimises(
    make_grid: Any, efficient_config: dict[str, Any]
) -> None:
    """By queries, in float64, and through the central model; its terms are in the rows."""
    smooth = run_snippet("objective")["smooth"]
    asked_in = set()

    def noted(images: torch.Tensor, *others: Any) -> Any:
        asked_in.add(images.dtype)
        return smooth(images, *others)

    OBJECTIVES["noted"] = noted
    generators = {}
    for objective in ("fedzge", "smooth", "noted"):
        config = {**efficient_config, "objective": objective, "run-name": objective}
        folder = run_server(make_grid(config), config)
        generators[objective] = load_file(folder / "generator.safetensors")["project.weight"]
        for row in rows_of(folder):
            loss = row["loss"]
            assert (objective != "fedzge") == ("roughness" in loss)
            terms = ("fidelity", "adversarial", "diversity", "information")
            total = sum(loss[term] for term in terms) + 0.1 * loss.get("roughness", 0.0)
            assert loss["total"] == pytest.approx(total, rel=1e-6)
    assert not torch.equal(generators["fedzge"], generators["smooth"])
    assert torch.equal(generators["noted"], generators["smooth"])
    assert asked_in == {torch.float32, torch.float64}


def test_an_objective_that_returns_no_total(
    make_grid: Any, efficient_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**efficient_config, "objective": "mine"}
    for terms in ({"loss": torch.zeros(())}, {"total": torch.zeros(2)}, {"total": 0.5}, None):
        monkeypatch.setitem(OBJECTIVES, "mine", lambda *_, terms=terms: terms)
        with pytest.raises(ConfigError, match="objective 'mine' must return scalar tensors by"):
            run_server(make_grid(config), config)
        shutil.rmtree(folder_of(config))


def test_an_ensemble_of_another_shape(
    make_grid: Any, efficient_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENSEMBLES, "mine", lambda answers: next(iter(answers.logits.values()))[0])
    config = {**efficient_config, "ensemble": "mine"}
    with pytest.raises(ConfigError, match=r"ensemble 'mine' returned shape \(10,\) for logits of"):
        run_server(make_grid(config), config)


def test_the_surest_client_answers() -> None:
    answers = Answers(
        {
            2: np.array([[1.0, 0.0, 0.0], [4.0, 3.0, 0.0]]),
            5: np.array([[0.0, 3.0, 1.0], [0.0, 0.5, 2.5]]),
        },
        {},
        {},
        2.0,
    )
    found = run_snippet("ensemble")["surest"](answers)
    assert found.tolist() == [[0.0, 1.5, 0.5], [0.0, 0.25, 1.25]]
    assert found.dtype == np.float32


def test_the_stripes_keep_to_the_contract_of_sources() -> None:
    stripes = run_snippet("source")["stripes"]
    for shape in ((1, 8, 8), (3, 9, 14)):
        made, again = (
            stripes(40, shape, Memories.of(1), torch.Generator().manual_seed(1)).images_NCHW
            for _ in range(2)
        )
        assert torch.equal(made, again)
        assert made.shape == (40, *shape)
        assert made.dtype == torch.float32
        assert float(made.abs().max()) <= 1
        # Stripes, which differ: along a column nothing changes, along a row something does.
        assert torch.equal(made, made[:, :, :1].expand_as(made))
        assert float(made.std(dim=3).min()) > 0.05
        assert len({image.numpy().tobytes() for image in made}) == 40


def test_the_estimators_gradients_have_one_length() -> None:
    from fedzge_flwr.zeroth_order.base import Estimate

    estimator = run_snippet("estimator")["Normalised"](None, 1, 0.1, "forward")
    gradients = torch.randn(3, 1, 2, 2, dtype=torch.float64)

    class Inner:
        def tell(self, *_: object) -> Estimate:
            return Estimate(gradients, None)  # type: ignore[arg-type]

    estimator.inner = Inner()
    found = estimator.tell(None, None, None).gradient_NCHW
    assert torch.allclose(found.flatten(1).norm(dim=1), torch.ones(3, dtype=torch.float64))


def test_the_data_set_is_used(
    tmp_path: Path, make_grid: Any, efficient_config: dict[str, Any]
) -> None:
    run_snippet("dataset")
    for split in ("train", "test"):
        labels = np.arange(60) % 3
        images = np.random.default_rng(0).integers(0, 256, (60, 1, 8, 8)).astype(np.uint8)
        np.savez(tmp_path / f"{split}.npz", images=images, labels=labels)
    config = {**efficient_config, "dataset": "blobs", "data-dir": str(tmp_path)}
    config |= {"num-train-images": 0, "num-test-images": 0}
    rows = rows_of(run_server(make_grid(config), config))
    assert [row["missing"] for row in rows] == [[], []]


def test_the_defence_hides_all_but_three(make_grid: Any, efficient_config: dict[str, Any]) -> None:
    names = run_snippet("defence")

    class Box:
        num_classes = 5

        def logits(self, images: Any) -> Any:
            return np.array([[5.0, 1.0, 4.0, 2.0, 3.0]])

        def evaluate(self, split: str) -> ClientEvaluation:
            return ClientEvaluation(1, 0.5, 1.0, self.logits(None))

    defended = names["OnlyTopThree"](Box())
    assert defended.num_classes == 5
    assert defended.logits(None).tolist() == [[5.0, 3.0, 4.0, 3.0, 3.0]]
    assert defended.evaluate("test").logits_NK.tolist() == [[5.0, 3.0, 4.0, 3.0, 3.0]]
    assert defended.evaluate("test").accuracy == 1.0
    grid = make_grid(efficient_config, app=names["app"])
    assert [row["missing"] for row in rows_of(run_server(grid, efficient_config))] == [[], []]


def test_a_black_box_with_one_method(capsys: pytest.CaptureFixture[str]) -> None:
    app = run_snippet("blackbox")["app"]
    settings = make_settings(
        image_shape=(1, 8, 8),
        num_classes=10,
        num_clients=2,
        synthetic_batch_size=20,
        central_distill_steps=2,
        server_threads=1,
    )
    central = mlp((1, 8, 8), 10)
    strategy = FedZGE(settings, central, observers=[run_snippet("observer")["Printer"]()])
    strategy.start(InProcessGrid(app, {}, 2), ArrayRecord(central.state_dict()), num_rounds=2)
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["1", "None"],
        ["2", "None"],
    ]


def test_the_tracker_is_given_every_figure(
    make_grid: Any, tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the tracker's own module, which is no dependency."""
    logged: list[tuple[dict[str, float], int]] = []

    class Run:
        def log(self, figures: dict[str, float], step: int) -> None:
            logged.append((figures, step))

    module = ModuleType("wandb")
    module.init = lambda project: Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    import server_app

    tracker = run_snippet("tracker")["Tracker"]("a project")
    whole = server_app.FedZGE

    def tracked(*args: Any, observers: Any, **more: Any) -> FedZGE:
        return whole(*args, observers=[*observers, tracker], **more)

    monkeypatch.setattr(server_app, "FedZGE", tracked)
    rows = rows_of(run_server(make_grid(tiny_config), tiny_config))
    assert [step for _, step in logged] == [1, 2]
    for row, (figures, _) in zip(rows, logged, strict=True):
        assert figures["accuracy/central"] == row["central_accuracy"]
        assert figures["client accuracy/2"] == row["client_accuracy"]["2"]
        assert figures["loss/total"] == row["loss"]["total"]
        assert figures["cost/MB down"] == row["bytes_down_total"] / 1e6


def test_the_reference_is_the_codes() -> None:
    text = (DOCS / "configuration.md").read_text()
    assert text == reference(), "run: python -m fedzge_flwr.config.reference --write"
    for section in (*SECTIONS.values(), NodeSettings, OwnerSettings):
        for name, field in section.model_fields.items():
            assert f"| `{kebab(name)}` |" in text
            assert field.description
    assert app_config() in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_index_names_every_page() -> None:
    index = (DOCS / "index.md").read_text()
    for path in DOCS.glob("*.md"):
        assert path.name == "index.md" or f"({path.name})" in index, path.name


def test_the_readme_is_read_to_its_end() -> None:
    """Its words and the length of its lines, and of the lines of prose in all other pages."""
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    assert max(map(len, text.splitlines())) <= 100
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for line in prose.splitlines():
            assert line.startswith("|") or "http" in line or len(line) <= 100, (page.name, line)


@pytest.mark.parametrize("recipe", ["efficient", "paper"])
def test_the_phases_are_those_of_the_page(
    recipe: str, make_grid: Any, efficient_config: dict[str, Any]
) -> None:
    """The page on the method names them in the order in which a round and its row have them."""
    config = {**efficient_config, "recipe": recipe}
    (row, _) = rows_of(run_server(make_grid(config), config))
    page = (DOCS / "method.md").read_text()
    title = {"efficient": "## The efficient round", "paper": "## The paper's round"}[recipe]
    section = page[page.index(title) :].split("\n## ")[0]
    phases = re.findall(r"^\d+\. \*\*(\w+)\.\*\*", section, re.MULTILINE)
    assert list(row["phase_seconds"]) == [*phases, "evaluate_central"]
