"""An extension of Griffe, which reads docstrings for the API pages: what they hold here that Markdown does not know.

Roles (``:func:`lstmcore.lstm```) become links.  The comment beside a field of a class, which is where its shape stands,
becomes the field's description.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Attribute, Class, Extension, Module, NameResolutionError, Object

ROLE = re.compile(r":(?:func|class|mod|meth|data|attr):`~?([\w.]+)`")
COMMENT = re.compile(r"# (?!type:|noqa)(.+)$")


class Conventions(Extension):
    """Applied once the package is loaded."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        self._visit(pkg)

    def _visit(self, found: Object) -> None:
        members = [member for member in found.members.values() if not member.is_alias]
        if isinstance(found, Class) and found.docstring and "Attributes:" not in found.docstring.value:
            fields = [(member.name, _comment(member)) for member in members if isinstance(member, Attribute)]
            described = "".join(f"\n    {name}: {comment}" for name, comment in fields if comment)
            found.docstring.value += f"\n\nAttributes:{described}" if described else ""
        if found.docstring:
            found.docstring.value = ROLE.sub(lambda role: _link(found, role[1]), found.docstring.value)
        for member in members:
            self._visit(member)
        if isinstance(found, Module) and not isinstance(found.filepath, list):
            found._filepath = found.filepath.resolve()  # the place in the repository, not in the tree for the build


def _comment(field: Attribute) -> str:
    """What stands beside a field without a docstring."""
    found = COMMENT.search(field.source) if field.docstring is None and field.name[0] != "_" else None
    return found[1] if found else ""


def _link(here: Object, name: str) -> str:
    """A link to what ``name`` means where it is used; code without a link where no page describes that."""
    first, dot, rest = name.partition(".")
    try:
        target = here.resolve(first) + dot + rest
    except NameResolutionError:  # a full path
        target = name
    return f'<autoref optional identifier="{target}"><code>{name}</code></autoref>'
