"""The configuration reference, from the code: ``python -m fedzge_flwr.config.reference``.

With ``--write`` it brings the files that hold parts of it up to date, in a checkout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tomli_w
from pydantic.fields import FieldInfo

from fedzge_flwr.common.files import atomic_write_text
from fedzge_flwr.config.node import NodeSettings
from fedzge_flwr.config.owner import OwnerSettings
from fedzge_flwr.config.parsing import SECTIONS
from fedzge_flwr.config.presets.catalogue import paper_settings
from fedzge_flwr.config.sections import Section, Settings, kebab

_TITLES = {
    "run": "The run",
    "data": "Data and their division",
    "images": "Images that are asked about, and the generator",
    "queries": "Queries and the ensemble",
    "training": "Local training",
    "distillation": "Distillation",
    "optimizer": "Optimizers",
}
_BOUNDS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))


def literal(value: object) -> str:
    """Return a value as a run config has it, in TOML."""
    written = tomli_w.dumps({"x": value}).strip().removeprefix("x = ")
    return written.replace("e-05", "e-5")


def kind_of(field: FieldInfo) -> str:
    """Return type and range of a field in a few words."""
    annotation = field.annotation
    if get_origin(annotation) is Literal:
        return " \\| ".join(f"`{literal(choice)}`" for choice in get_args(annotation))
    parts = [part for part in get_args(annotation) if part is not type(None)]
    # Of an Annotated part within a union the bounds are in the part.
    inner = parts[0] if parts else annotation
    metadata = [*field.metadata, *getattr(inner, "__metadata__", ())]
    inner = getattr(inner, "__origin__", inner)
    names: Mapping[Any, str] = {bool: "true or false", int: "integer", float: "number", str: "text"}
    bounds = [
        f"{sign} {getattr(item, name):g}"
        for name, sign in _BOUNDS
        for item in _flat(metadata)
        if getattr(item, name, None) is not None
    ]
    return ", ".join([names[inner], *bounds])


def _flat(metadata: list[Any]) -> list[Any]:
    """Return metadata with those of nested fields."""
    found: list[Any] = []
    for item in metadata:
        found += [item, *_flat(list(getattr(item, "metadata", ())))]
    return found


def table(section: type[Section], defaults: Mapping[str, object]) -> list[str]:
    """Return the lines of a section's table: key, type and range, default, meaning."""
    paper = paper_settings()
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        key = kebab(name)
        default = f"`{literal(defaults[key])}`" if key in defaults else "–"
        if section in SECTIONS.values() and paper.get(key, field.default) != field.default:
            default += f" (paper `{literal(paper[key])}`)"
        meaning = (field.description or "").replace("|", "\\|")
        lines.append(f"| `{key}` | {kind_of(field)} | {default} | {meaning} |")
    return lines


def reference() -> str:
    """Return the whole reference as Markdown."""
    lines = [
        "# Configuration",
        "",
        "Made from the code by `python -m fedzge_flwr.config.reference --write`.",
        "",
        "## Settings of a run",
        "",
        "Keys of `--run-config`, of `RUN_CONFIG` and of a preset. Unknown keys, wrong types and",
        "values out of range end the run before any client starts, with one line that names the",
        "key and what is allowed. Where a second value stands, it is that of the preset `paper`.",
    ]
    defaults = Settings().to_run_config()
    for name, section in SECTIONS.items():
        lines += ["", f"### {_TITLES[name]}", "", *table(section, defaults)]
    owner = {kebab(name): field.default for name, field in OwnerSettings.model_fields.items()}
    lines += [
        "",
        "## Settings of a node",
        "",
        "Keys of `flower-supernode --node-config`: its owner's, and nobody else's. They are in no",
        "message, and other keys are left alone, unless they look like a misspelling.",
        "",
        "### What the PyTorch client is made of",
        "",
        *table(NodeSettings, {}),
        "",
        "### What the owner allows",
        "",
        "They hold for every black box.",
        "",
        *table(OwnerSettings, owner),
        "",
    ]
    return "\n".join(lines)


def app_config() -> str:
    """Return the lines of ``[tool.flwr.app.config]``: every key at its default."""
    defaults = Settings().to_run_config()
    groups = [
        "".join(f"{kebab(n)} = {literal(defaults[kebab(n)])}\n" for n in section.model_fields)
        for section in SECTIONS.values()
    ]
    return "\n".join(groups)


def main(given: list[str] | None = None) -> None:
    """Print the reference, or write what is made of it."""
    parser = argparse.ArgumentParser(description="The configuration reference, from the code.")
    parser.add_argument(
        "--write", action="store_true", help="bring docs/ and the apps' pyproject.toml up to date"
    )
    if not parser.parse_args(given).write:
        sys.stdout.write(reference())
        return
    root = Path(__file__).parents[2]
    atomic_write_text(root / "docs" / "configuration.md", reference())
    _write_config(root / "pyproject.toml")
    _write_config(root / "examples" / "comparison" / "pyproject.toml", 'strategy = "fedzge"\n\n')


def _write_config(project: Path, first: str = "") -> None:
    """Bring an app's ``[tool.flwr.app.config]`` up to date; ``first`` is what it begins with."""
    mark = "[tool.flwr.app.config]\n"
    before, _, rest = project.read_text(encoding="utf-8").partition(mark)
    after = rest[rest.index("\n[tool.") :] if "\n[tool." in rest else ""
    atomic_write_text(project, f"{before}{mark}{first}{app_config()}{after}")


if __name__ == "__main__":
    main()
