"""KEY=VALUE as people type it."""

from __future__ import annotations

import pytest

from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.config.pairs import parse_pairs


def test_pairs() -> None:
    found = parse_pairs(["seed=1 alpha=0.5", "run-name='a b' download=true", "seed=2"], "--x")
    assert found == {"seed": 2, "alpha": 0.5, "run-name": "a b", "download": True}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed=1 alpha=1.0 seed=2", "--x: 'seed' is given twice; give it once"),
        ("seed = 1", "--x: 'seed' is not KEY=VALUE (without spaces)"),
        ("download=True", "--x: download=True: write true"),
        ("dataset=mnist", 'a text is in quotes: dataset="mnist"'),
        ('data-dir="C:\\data"', "not TOML; write \\\\ for a backslash"),
        ("seed=" + "[" * 5000, "the value is no number, true or false"),
        ("seed=[1]", "the value is no number, true or false"),
    ],
)
def test_what_is_no_pair_is_named(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_pairs([text], "--x")
    assert problem in str(caught.value)
