"""Rows of a table: their values are independent, and lie anywhere in the range."""

from __future__ import annotations

import torch

from fedzge_flwr.synthesis.tables import independent_values


def test_neighbours_have_nothing_in_common() -> None:
    rows = independent_values(4000, (1, 1, 6), torch.Generator().manual_seed(0)).flatten(1)
    correlations = torch.corrcoef(rows.T) - torch.eye(6)
    assert correlations.abs().max() < 0.06
    assert abs(float(rows.mean())) < 0.02


def test_some_rows_lie_at_the_ends_of_the_range_and_some_in_its_middle() -> None:
    rows = independent_values(2000, (1, 1, 50), torch.Generator().manual_seed(0)).flatten(1)
    far = rows.abs().mean(dim=1)
    assert far.min() < 0.25
    assert far.max() > 0.7
    assert rows.abs().max() <= 1
