"""Print a run folder as a Markdown table: ``python -m benchmarks.run_table RUN``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.told import told
from fedzge_flwr.common.text import percent
from fedzge_flwr.report.runs import load_run

HEADER = (
    "| round | central | ensemble | mean client | queries a client | down MB | up MB | seconds |\n"
    "|---|---|---|---|---|---|---|---|"
)


def table(rows: list[dict[str, Any]], rounds: list[int]) -> str:
    """Return the rows of the given rounds; bytes and seconds are since the start."""
    lines = [HEADER]
    seconds = 0.0
    for row in rows:
        seconds += row["seconds"]
        if row["round"] in rounds:
            cells = (
                str(row["round"]),
                percent(row["central_accuracy"]),
                percent(row["ensemble_accuracy"]),
                percent(row["mean_client_accuracy"]),
                f"{row['queries_per_client']:,}",
                f"{row['bytes_down_total'] / 1e6:,.1f}",
                f"{row['bytes_up_total'] / 1e6:,.1f}",
                f"{seconds:,.0f}",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--rounds", help="comma-separated; default: first, every fifth, last")
    arguments = parser.parse_args()
    rows = [row.to_json() for row in load_run(arguments.run).rows]
    if arguments.rounds:
        rounds = [int(number) for number in arguments.rounds.split(",")]
    else:
        numbers = [row["round"] for row in rows]
        rounds = [n for n in numbers if n in (numbers[0], numbers[-1]) or n % 5 == 0]
    print(table(rows, rounds))


if __name__ == "__main__":
    told(main)
