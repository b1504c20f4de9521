"""The guide "From your Flower app": its snippets put into a published app, and what they do there.

The app is the quickstart as it was: a table of Hugging Face's, a loader that normalises.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedzge_flwr import ImageSet
from tests.helpers.boxes import context_of, digits
from tests.helpers.paths import ROOT
from tests.helpers.small_models import mlp
from tests.helpers.snippets import ADOPTING, snippets_of

SNIPPETS = snippets_of(ADOPTING)
BEFORE = ROOT / "examples" / "quickstart-strategy"


def adopted(place: Path, *, own_training: bool = False) -> Path:
    """Put the guide's snippets into the app, by copying and nothing else."""
    for file in (BEFORE / "task.py", BEFORE / "pyproject.toml"):
        shutil.copy(file, place)
    client = (BEFORE / "before" / "client_app.py").read_text()
    added = SNIPPETS["client"]
    if own_training:
        black_box = re.sub(
            r"    model = .*\Z",
            "    return black_box_of_ones_own(context, loader, own)\n\n\n",
            added,
            flags=re.DOTALL,
        )
        added = black_box + SNIPPETS["training"] + "\n\nregister_endpoints(app, black_box)\n"
    server = (BEFORE / "before" / "server_app.py").read_text()
    server = server[: server.index("@app.main()")]
    (place / "shared.py").write_text(SNIPPETS["shared"])
    (place / "client_app.py").write_text(f"{client}\n\n{added}")
    (place / "server_app.py").write_text(f"{server}\n\n{SNIPPETS['server']}")
    return place


def run(place: Path) -> str:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.helpers.run_example", str(place), "5"),
            *("num-server-rounds=2\nlocal-epochs=1", "20"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("own_training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_published_app_is_adopted_by_the_guide(tmp_path: Path, own_training: bool) -> None:
    """Without a warning, and it learns: what was wrong in silence is right as it is written."""
    out = run(adopted(tmp_path, own_training=own_training))
    assert "WARNING" not in out
    found = [float(value) for value in re.findall(r"central ([\d.]+) %", out)]
    assert len(found) == 2
    assert found[-1] > 50


def test_the_guide_adds_few_lines() -> None:
    lines = [
        line
        for name in ("shared", "client", "server")
        for line in SNIPPETS[name].splitlines()
        if line.strip()
    ]
    assert len(lines) <= 40


def test_a_black_box_that_trains() -> None:
    """The guide's own: made for each message, it goes on from what it has learned."""
    names: dict[str, object] = {}
    exec(compile(SNIPPETS["trainable"], "adopting.md: trainable", "exec"), names)
    kind = names["NearestMeans"]
    assert callable(kind)
    own: ImageSet = digits(num=400)
    box = kind(context_of(), own, 10)
    before = np.mean(box.logits(own.inputs_NCHW).argmax(axis=1) == own.labels_N)
    assert box.fit(1).num_examples == 400
    again = kind(context_of(), own, 10)
    again.load_state(box.state())
    after = np.mean(again.logits(own.inputs_NCHW).argmax(axis=1) == own.labels_N)
    assert before < 0.2 < 0.8 < after
    assert again.own_correct(50).mean() > 0.6


def test_a_model_is_made_as_sure_as_it_is_right() -> None:
    names: dict[str, object] = {}
    exec(compile(SNIPPETS["surer"], "adopting.md: surer", "exec"), names)
    make = names["surer"]
    assert callable(make)
    test = digits("test", 300)
    torch.manual_seed(0)
    model = mlp((1, 8, 8), 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train = digits(num=600)
    x, y = torch.tensor(train.inputs_NCHW), torch.tensor(train.labels_N)
    for _ in range(20):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(5 * model(x), y).backward()
        optimizer.step()
    images, labels = torch.tensor(test.inputs_NCHW), test.labels_N
    surer = make(model, images, labels)
    with torch.no_grad():
        before, after = (
            torch.nn.functional.cross_entropy(found(images), torch.tensor(labels))
            for found in (model, surer)
        )
        assert torch.equal(model(images).argmax(dim=1), surer(images).argmax(dim=1))
    assert after < before - 0.1


def test_the_guide_names_every_warning() -> None:
    """As they are written: a user finds the line that they have seen."""
    sources = "".join(
        (ROOT / "fedzge_flwr" / name).read_text()
        for name in (
            *("black_boxes/shown.py", "images/image_set.py", "server/doubts.py"),
            *("server/checks.py", "grid/agreement.py"),
        )
    )
    table = ADOPTING[ADOPTING.index("## What a warning means") :]
    told = [row.split("|")[1].strip() for row in table.splitlines()[4:] if row.startswith("|")]
    assert len(told) == 6
    joined = re.sub(r'"\s+f?"', "", sources).replace("`", "")
    for text in told:
        longest = max(text.replace("`", "").split("…"), key=len).strip(" ,:")
        assert longest in joined or longest.split("a client's ")[-1] in joined, text
