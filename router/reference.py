"""The reference of the configuration, made from the option structs themselves: ``python -m router.reference``.

Reads the source of `router.options`, because the reasons for the defaults stand there as comments.
"""

from __future__ import annotations

import ast
import inspect
import io
import sys
import textwrap
import tokenize
from collections.abc import Iterable
from typing import Any

import msgspec
import tomli_w

from router.config import INDEX, Leaf, leaves
from router.fields import expected

_INTRODUCTION = """\
# Configuration

<!-- Made by `python -m router.reference` from router/options.py: change that file, not this one. -->

One TOML file; each section below is a table in it. Every field can also be set by its environment variable, and some by
a flag: flags win over environment variables, which win over the file, which wins over the defaults. Unknown fields and
`KVLANE_` variables are refused, with the nearest valid name; `KVLANE_COMPILED` is none of the fields
([what it does](decisions/0007-compiled-parts.md)).

- `N` in a name is an index from 0: `KVLANE_ENGINES_0_REPLICAS=4` sets `replicas` of the first engine. An index one past
  the end adds an engine.
- A table or array as an environment variable is JSON and replaces the whole field:
  `KVLANE_POLICY_OPTIONS='{"choices": 3}'`, `KVLANE_HTTP_CORS_ORIGINS='[]'`.
- In Kubernetes set `enableServiceLinks: false` in the pod. Otherwise each Service whose name starts with `kvlane` puts
  variables like `KVLANE_PORT` into every container.

`kvlane check FILE` prints the configuration as it is read, with all defaults. Examples: [configs/](../configs).
"""


class FieldDoc(msgspec.Struct, frozen=True):
    """All there is to tell about one field."""

    name: str
    """Dotted, ``N`` where an index goes."""
    expected: str
    default: str
    """As TOML writes it; empty where the field has none."""
    env: str
    reason: str
    """The comment beside the default."""


def describe() -> list[FieldDoc]:
    """Every field of the configuration, in the order of its definition."""
    return [_document(leaf) for leaf in leaves()]


def markdown() -> str:
    """The reference page."""
    sections: dict[tuple[str, ...], list[Leaf]] = {}
    for leaf in leaves():
        sections.setdefault(leaf.path[:-1], []).append(leaf)
    parts = [_INTRODUCTION]
    for path, rows in sorted(sections.items(), key=lambda section: section[0] != ()):
        about = vars(rows[0].owner).get("__doc__") or ""  # Not `getdoc`, which falls back to the base's.
        parts.append(
            "\n\n".join(filter(None, [f"\n## {_heading(path)}", inspect.cleandoc(about), _table(rows)])) + "\n"
        )
    return "".join(parts)


def _heading(path: tuple[str, ...]) -> str:
    if not path:
        return "Top level"
    names = ".".join(name for name in path if name != INDEX)
    return f"`[[{names}]]`" if path[-1] == INDEX else f"`[{names}]`"


def _table(rows: Iterable[Leaf]) -> str:
    lines = ["| field | takes | default | why | environment |", "|---|---|---|---|---|"]
    for row in rows:
        doc = _document(row)
        default = f"`{doc.default}`" if doc.default else "required"
        lines.append(f"| `{row.path[-1]}` | {doc.expected} | {default} | {doc.reason} | `{doc.env}` |")
    return "\n".join(lines)


def _document(leaf: Leaf) -> FieldDoc:
    default = "" if leaf.info.required else _toml(leaf.info)
    reason = _comments(leaf.owner).get(leaf.info.name, "")
    return FieldDoc(".".join(leaf.path), expected(leaf.kind), default, leaf.env, reason)


def _toml(info: msgspec.structs.FieldInfo) -> str:
    factory: Any = info.default_factory
    value = info.default if factory is msgspec.NODEFAULT else factory()
    if isinstance(value, dict) and not value:
        return "{}"
    line = tomli_w.dumps({"x": list(value) if isinstance(value, tuple) else value}).removeprefix("x = ")
    return " ".join(line.split()).replace("[ ", "[").replace(", ]", "]")


def _comments(struct: type[msgspec.Struct]) -> dict[str, str]:
    """The comment on each field's line, by field."""
    source = textwrap.dedent(inspect.getsource(struct))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    return {
        line.target.id: by_line[line.end_lineno or line.lineno]
        for line in definition.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and (line.end_lineno in by_line)
    }


if __name__ == "__main__":
    sys.stdout.write(markdown())
