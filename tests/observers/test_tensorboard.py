"""TensorBoard's files of a run that was resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.resuming import resume
from tests.helpers.running import rows_of, run_server


def test_every_round_is_there_once(
    make_grid: Any,
    efficient_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also of rounds that are done again, and of those whose figures a loss of power took."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = {**efficient_config, "num-server-rounds": 3, "tensorboard": True}
    monkeypatch.setenv("FEDZGE_STATE_DIR", str(tmp_path / "states"))
    folder = run_server(make_grid(config), config)
    (folder / "checkpoints" / "round-000003.checkpoint").unlink()
    (events,) = (folder / "tensorboard").iterdir()
    written = events.read_bytes()
    for left in (written, written[: len(written) // 3]):
        events.write_bytes(left)
        resume(make_grid, config)
        found = EventAccumulator(str(folder / "tensorboard"))
        found.Reload()
        points = found.Scalars("accuracy/central")
        assert [point.step for point in points] == [1, 2, 3]
        assert [point.value for point in points] == pytest.approx(
            [row["central_accuracy"] for row in rows_of(folder)]
        )
        (folder / "checkpoints" / "round-000003.checkpoint").unlink()
        for path in (folder / "tensorboard").iterdir():
            if path != events:
                path.unlink()
