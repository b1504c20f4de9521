"""A method from outside, as the documentation has it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from fedzge_flwr.compare.app import client_app, run_here
from fedzge_flwr.compare.catalogue import METHODS
from fedzge_flwr.compare.command import compare
from tests.helpers.paths import ROOT

CONFIG = {
    "num-clients": 2,
    "num-server-rounds": 2,
    "num-test-images": 40,
    "synthetic-batch-size": 32,
    "min-local-steps": 2,
    "client-distill-steps": 2,
}


@pytest.fixture
def dsfl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    text = (ROOT / "docs" / "comparison.md").read_text()
    (snippet,) = re.findall(r"^```python dsfl\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(snippet.splitlines()) <= 60
    (tmp_path / "dsfl.py").write_text(snippet)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "dsfl", raising=False)
    return "dsfl:DSFL"


def test_a_method_of_the_documentation_runs_beside_the_packages(dsfl: str, tmp_path: Path) -> None:
    shown = compare([dsfl, "fedmd"], [0], CONFIG, tmp_path / "out", jobs=1, told=lambda line: None)
    lines = shown.splitlines()
    assert lines[2].startswith("| FedMD, photographs | ")
    assert lines[3].startswith("| DS-FL | logits on public images | ")
    assert (tmp_path / "out" / "dsfl_DSFL-s0.json").is_file()
    assert "dsfl:DSFL" not in METHODS


def test_its_clients_answer_what_it_registers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "greeting.py").write_text(
        "from dataclasses import replace\n"
        "from flwr.app import Message, MetricRecord, RecordDict\n"
        "from fedzge_flwr.compare.methods.alone import LOCAL\n"
        "def register(app):\n"
        "    @app.query('greeting')\n"
        "    def greet(message, context):\n"
        "        metrics = MetricRecord({'own': context.node_config['partition-id']})\n"
        "        return Message(RecordDict({'metrics': metrics}), reply_to=message)\n"
        "def run(session):\n"
        "    session.record(1, mean_client=session.mean_of('query.greeting', 'own'))\n"
        "METHOD = replace(LOCAL, title='greeting', run=run, endpoints=register)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = run_here("greeting:METHOD", CONFIG, lambda line: None)
    assert found.points[-1].mean_client == 0.5
    assert client_app() is not client_app()
