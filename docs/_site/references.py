"""Links in docstrings: a public name between single backticks leads to where it is documented."""

from __future__ import annotations

import re
from typing import Any

import griffe

_NAME = re.compile(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)")


class References(griffe.Extension):
    """Links public names, and members of the classes among them, in the docstrings of all these."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite docstrings before they are rendered."""
        homes = {
            name: alias.target_path
            for name, alias in pkg.members.items()
            if isinstance(alias, griffe.Alias) and alias.target_path.startswith(f"{pkg.name}.")
        }
        public = {name: pkg[home.removeprefix(f"{pkg.name}.")] for name, home in homes.items()}
        targets: dict[str, str] = {}
        members: dict[str, dict[str, str]] = {}
        for name, found in public.items():
            path = f"{pkg.name}.{name}"
            members[name] = {
                member: f"{path}.{member}" for member, item in found.members.items() if shown(item)
            }
            inner = {f".{member}": anchor for member, anchor in members[name].items()}
            for written in (name, path, homes[name]):
                targets |= {f"{written}{end}": to for end, to in {"": path, **inner}.items()}
        for name, found in public.items():
            for item in (found, *found.members.values()):
                if not item.is_alias and item.docstring:
                    item.docstring.value = linked(
                        item.docstring.value, {**members[name], **targets}
                    )


def shown(member: griffe.Object | griffe.Alias) -> bool:
    """Whether a member of a class is on the page of its class."""
    return not member.is_alias and member.is_public and member.docstring is not None


def linked(text: str, targets: dict[str, str]) -> str:
    """Return a docstring with links around the names that lead somewhere."""

    def link(found: re.Match[str]) -> str:
        return f"[{found[0]}][{targets[found[1]]}]" if found[1] in targets else found[0]

    return _NAME.sub(link, text)
