"""The forms of a round by name, as the setting ``recipe`` has them."""

from __future__ import annotations

from fedzge_flwr.server.efficient import EFFICIENT_ROUND
from fedzge_flwr.server.round import PAPER_ROUND, Phase

RECIPES: dict[str, tuple[Phase, ...]] = {"efficient": EFFICIENT_ROUND, "paper": PAPER_ROUND}
