"""The report: what it says is what the run folders hold, and it opens in a browser."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedzge_flwr.common.errors import RunFolderError
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.presets.catalogue import PAPER, preset_file, read_settings
from fedzge_flwr.data.loading import load_split
from fedzge_flwr.report import figures
from fedzge_flwr.report.page import write_report
from fedzge_flwr.report.runs import Run, group, load_run
from tests.helpers.inprocess import InProcessGrid
from tests.helpers.running import run_server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds of the paper's preset and one run of the other recipe, all real."""
    import client_app

    place = tmp_path_factory.mktemp("runs")
    common = {
        "output-dir": str(place),
        "num-clients": 3,
        "num-server-rounds": 3,
        "num-train-images": 120,
        "num-test-images": 60,
        "synthetic-batch-size": 40,
        "generator-width": 4,
        "local-epochs": 1,
        "central-distill-steps": 2,
        "client-distill-steps": 2,
        "server-threads": 1,
    }
    paper = read_settings(preset_file(PAPER))
    folders = []
    for name, more in {
        "paper-0": {**paper, "seed": 0},
        "efficient": {"seed": 0, "eval-every": 2, "generator-share": 3.0},
        "paper-1": {**paper, "seed": 1},
    }.items():
        config = {**more, **common, "run-name": name}
        folders.append(run_server(InProcessGrid(client_app.app, config, 3), config))
    return folders


def figures_of(page: Path) -> list[dict[str, Any]]:
    (data,) = re.findall(r"^const figures = (\[.*\]);$", page.read_text(), re.MULTILINE)
    found: list[dict[str, Any]] = json.loads(data)
    return found


def test_what_a_run_leaves_for_a_report(runs: list[Path]) -> None:
    for folder in runs:
        run = load_run(folder)
        counts = np.array(run.config["class_counts"])
        assert counts.shape == (3, 10)
        assert counts.sum() == 120
        assert [sum(row.answer_classes) for row in run.rows] == [40, 40, 40]
        assert sorted(run.pictures) == [1, 2, 3]
        with Image.open(folder / "generated" / "round-000003.png") as strip:
            assert strip.size[1] == 8
            assert strip.size[0] % 8 == 0
            assert 8 <= strip.size[0] <= 80


def test_figures_by_class_are_those_of_the_accuracies(runs: list[Path]) -> None:
    """The recalls of a balanced or unbalanced test set average to the accuracy."""
    settings = load_run(runs[0]).config["settings"]
    labels = load_split(from_run_config(settings).data, "test").labels_N
    parts = np.bincount(labels, minlength=10) / len(labels)
    for row in load_run(runs[0]).rows:
        for recalls, accuracy in (
            (row.recalls.central_recalls, row.central_accuracy),
            (row.recalls.ensemble_recalls, row.ensemble_accuracy),
        ):
            mean = sum(p * (r or 0) for p, r in zip(parts, recalls, strict=True))
            assert mean == pytest.approx(accuracy, abs=1e-5)
        assert sum(map(sum, row.recalls.confusion)) == len(labels) == 60


def test_runs_that_differ_by_seed_alone_are_one_group(runs: list[Path]) -> None:
    groups = group([load_run(folder) for folder in runs])
    assert [[run.folder.name for run in item.runs] for item in groups] == [
        ["paper-0", "paper-1"],
        ["efficient"],
    ]
    assert [item.label for item in groups] == ["recipe paper", "recipe efficient"]
    paper = groups[0]
    x, mean, spread = paper.curve(
        lambda row: float(row.queries_per_client), lambda row: row.central_accuracy
    )
    values = np.array([[row.central_accuracy for row in run.rows] for run in paper.runs])
    assert x == [row.queries_per_client for row in paper.runs[0].rows]
    np.testing.assert_allclose(mean, values.mean(axis=0))
    np.testing.assert_allclose(spread, values.std(axis=0))


def test_no_two_groups_have_one_label(runs: list[Path]) -> None:
    """The recipe says enough, unless runs of one recipe differ in more than their seeds."""
    first, other = load_run(runs[0]), load_run(runs[1])
    settings = {**first.config["settings"], "alpha": 0.3}
    changed = replace(first, config={**first.config, "settings": settings})
    labels = [item.label for item in group([first, changed, other])]
    assert len(set(labels)) == 3
    assert labels[0].startswith("alpha 1.0, ")
    assert labels[1].startswith("alpha 0.3, ")


def test_a_curve_has_only_what_all_have_measured(runs: list[Path]) -> None:
    (item,) = group([load_run(runs[1])])
    assert item.label == "efficient"
    x, _, _ = item.curve(lambda row: float(row.round), lambda row: row.central_accuracy)
    assert x == [2.0, 3.0]
    assert item.curve(lambda row: None, lambda row: 1.0) == ([], [], [])


def test_the_figures_show_the_rows(runs: list[Path]) -> None:
    run = load_run(runs[0])
    drawn = {trace.name: trace for trace in figures.accuracy(run, "queries").data}
    assert list(drawn["central model"].y) == [row.central_accuracy for row in run.rows]
    assert list(drawn["central model"].x) == [row.queries_per_client for row in run.rows]
    assert [drawn[f"client {n}"].y[-1] for n in range(3)] == [
        run.rows[-1].client_accuracy[n] for n in range(3)
    ]
    bars = figures.ledger(run).data
    for way, sign in (("down", -1), ("up", 1)):
        height = sum(np.array(bar.y) for bar in bars if bar.name.startswith(way))
        wanted = [getattr(row, f"bytes_{way}") / 3e6 for row in run.rows]
        np.testing.assert_allclose(sign * height, wanted)
    seconds = sum(np.array(bar.y) for bar in figures.phases(run).data)
    np.testing.assert_allclose(seconds, [sum(row.phase_seconds.values()) for row in run.rows])
    balance = figures.class_balance(run)
    assert balance is not None
    np.testing.assert_allclose(np.array(balance.data[0].z).sum(axis=0), 1)
    last = run.rows[-1].recalls
    bars = {bar.name: list(bar.y) for bar in figures.recalls(run).data}  # type: ignore[union-attr]
    assert bars["central model"] == list(last.central_recalls)
    assert bars["ensemble"] == list(last.ensemble_recalls)
    confusion = figures.confusion(run)
    assert confusion is not None
    shares = np.array(confusion.data[0].z).sum(axis=1)
    assert [sum(row) > 0 for row in last.confusion] == [bool(share) for share in shares]
    np.testing.assert_allclose(shares[shares > 0], 1)
    counts = figures.partition(run)
    assert counts is not None
    assert np.array(counts.data[0].z).sum() == 120


def test_what_is_not_known_is_left_out(runs: list[Path]) -> None:
    """Of earlier versions, or where the data are with the clients alone."""
    run = load_run(runs[0])
    config = {key: value for key, value in run.config.items() if key != "class_counts"}
    rows = [{**row.to_json()} for row in run.rows]
    for row in rows:
        del row["answer_classes"], row["recalls"]
    older = Run(run.folder, config, [type(run.rows[0]).from_json(row) for row in rows], {})
    assert figures.partition(older) is None
    assert figures.class_balance(older) is None
    assert figures.recalls(older) is None
    assert figures.confusion(older) is None


def test_one_page_without_a_network(runs: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_report(runs, page)
    text = page.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    # Three that compare, and nine of each run.
    assert len(figures_of(page)) == 3 + 3 * 9
    assert text.count("data-figure='") == 30
    before_the_scripts = text[: text.index("<script>")]
    assert not re.search(r"(src|href)=['\"](?!data:)", before_the_scripts)
    assert before_the_scripts.count("data:image/png;base64,") == 9
    values = [load_run(folder).rows[-1].central_accuracy for folder in (runs[0], runs[2])]
    mean = f"{100 * np.mean(values):.1f} ± {100 * np.std(values):.1f} %"  # type: ignore[arg-type]
    assert mean in before_the_scripts


def test_texts_of_others_are_only_text(runs: list[Path], tmp_path: Path) -> None:
    """A run's name, or a client's description, cannot become part of the page."""
    evil = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(runs[0], evil)
    config = json.loads((evil / "config.json").read_text())
    config["clients"]["0"] = "</script><script>alert(2)</script>"
    (evil / "config.json").write_text(json.dumps(config))
    page = tmp_path / "report.html"
    write_report([evil, runs[1]], page)
    text = page.read_text()
    assert "<img src=x" not in text
    assert "<script>alert" not in text
    assert text.count("</script>") == 2


def test_pictures_are_drawn_anew_from_their_pixels(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    path = folder / "generated" / "round-000002.png"
    before = path.read_bytes()
    path.write_bytes(before + b"hidden behind it")
    found = load_run(folder).pictures[2]
    assert b"hidden" not in found
    with Image.open(io.BytesIO(found)) as drawn, Image.open(io.BytesIO(before)) as original:
        assert drawn.format == "PNG"
        assert (np.asarray(drawn) == np.asarray(original)).all()


def test_marks_of_the_page_in_texts_are_texts(runs: list[Path], tmp_path: Path) -> None:
    """One of them stood for all of Plotly, as often as it was written."""
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    config = json.loads((folder / "config.json").read_text())
    config["clients"]["0"] = "/*plotly*/ /*figures*/ <!--content-->" * 3
    (folder / "config.json").write_text(json.dumps(config))
    write_report([folder], tmp_path / "report.html")
    write_report(runs[:1], tmp_path / "other.html")
    sizes = [(tmp_path / name).stat().st_size for name in ("report.html", "other.html")]
    assert abs(sizes[0] - sizes[1]) < 1000


def test_names_of_others_are_no_links_in_figures(runs: list[Path]) -> None:
    run = load_run(runs[0])
    named = [
        replace(row, phase_seconds={"<a href='http://x'>y</a>\n" + "z" * 500: 1.0})
        for row in run.rows
    ]
    (bar, _) = figures.phases(replace(run, rows=named)).data
    assert bar.name.startswith("&lt;a href='http://x'&gt;y&lt;/a&gt;\\nzzz")
    assert len(bar.name) < 120


def test_of_many_rounds_a_thousand_are_drawn(runs: list[Path]) -> None:
    run = load_run(runs[0])
    many = [replace(run.rows[0], round=number) for number in range(1, 5001)]
    drawn = figures.accuracy(replace(run, rows=many), "round").data[-1]
    assert len(drawn.x) == 1000
    assert (drawn.x[0], drawn.x[-1]) == (1, 5000)
    assert len(set(drawn.x)) == 1000


def test_of_many_pictures_twelve_are_shown(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    picture = (folder / "generated" / "round-000001.png").read_bytes()
    for number in range(1, 101):
        (folder / "generated" / f"round-{number:06d}.png").write_bytes(picture)
    shown = sorted(load_run(folder).pictures)
    assert len(shown) == 12
    assert (shown[0], shown[-1]) == (1, 100)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("nothing", "is not the folder of a run with rounds: it has no config.json"),
        ("no rows", "it has no rounds.jsonl"),
        ("empty", "has no finished round yet"),
        ("rows", "cannot be read as a run"),
        ("config", "cannot be read as a run"),
    ],
)
def test_what_is_no_run(damage: str, message: str, runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if damage == "nothing":
        folder.mkdir()
    else:
        shutil.copytree(runs[0], folder)
        path = folder / ("config.json" if damage == "config" else "rounds.jsonl")
        path.write_text({"rows": "{}\n", "config": "[]"}.get(damage, ""))
        if damage == "no rows":
            path.unlink()
    with pytest.raises(RunFolderError) as caught:
        write_report([folder], tmp_path / "report.html")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"cannot be written to .*; name another file"):
        write_report([runs[0]], tmp_path / "nowhere" / "report.html")


def test_a_row_that_is_being_written_is_left_out(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    rows = (folder / "rounds.jsonl").read_text()
    (folder / "rounds.jsonl").write_text(rows[:-20])
    assert len(load_run(folder).rows) == 2


def test_tensorboard_has_the_rows(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    import client_app

    config = {
        "output-dir": str(tmp_path),
        "run-name": "run",
        "recipe": "paper",
        "tensorboard": True,
        "num-clients": 2,
        "num-server-rounds": 2,
        "num-train-images": 60,
        "num-test-images": 60,
        "synthetic-batch-size": 12,
        "generator-width": 4,
        "local-epochs": 1,
        "central-distill-steps": 2,
        "client-distill-steps": 2,
        "server-threads": 1,
    }
    folder = run_server(InProcessGrid(client_app.app, config, 2), config)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for row in load_run(folder).rows:
        for name, value in row.figures().items():
            (found,) = [item.value for item in events.Scalars(name) if item.step == row.round]
            assert found == pytest.approx(value, rel=1e-6)


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    return subprocess.run(
        [
            CHROMIUM,
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--enable-logging=stderr", "--virtual-time-budget=30000"),
            # No name resolves: what needs a network fails, and says so on the console.
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={page.parent / 'profile'}",
            *options,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )


@pytest.mark.e2e
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: make browser installs it, as root")
@pytest.mark.parametrize(("scheme", "width"), [("light", 1400), ("dark", 390)])
def test_it_opens_in_a_browser(runs: list[Path], tmp_path: Path, scheme: str, width: int) -> None:
    page = tmp_path / "report.html"
    write_report(runs[:1], page)
    options = [
        f"--window-size={width},2400",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
    ]
    opened = browse(page, "--dump-dom", *options)
    consoles = [line for line in opened.stderr.splitlines() if "CONSOLE" in line]
    assert consoles == []
    # Every figure of the run that is open, each with its plot.
    assert opened.stdout.count("data-drawn=") == 9
    assert opened.stdout.count('class="main-svg"') >= 9
    picture = tmp_path / "page.png"
    browse(page, f"--screenshot={picture}", *options)
    with Image.open(picture) as shown:
        pixels = np.asarray(shown.convert("RGB"))
    assert pixels.shape[1] == width
    ground = pixels[5, 5].mean()
    assert ground > 200 if scheme == "light" else ground < 60
    # Figures have colours; text alone is grey.
    spread = pixels.max(axis=2).astype(int) - pixels.min(axis=2)
    assert (spread > 60).mean() > 0.002
