"""Plan files as text: strict YAML in and out, and errors that name file, line and field."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ditopt.errors import PlanError

MAX_FINDINGS = 20
MAX_DIGITS = 40
CUT_SHORT = "if the file was cut short, make the plan again with `ditopt optimize DIR --prompts FILE -o PLAN`"


def read_yaml(text: str, source: str) -> tuple[Any, Any]:
    """What a YAML text says, and its node tree (None for an empty one); ``source`` is how errors name it.

    Raises:
        PlanError: it is not YAML, or has aliases, tags, huge numbers or repeated keys.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return loader.construct_document(node) if node is not None else None, node
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error)
        hint = f"; {CUT_SHORT}" if isinstance(error, yaml.parser.ParserError | yaml.scanner.ScannerError) else ""
        raise PlanError(f"{where}: not a plan in YAML: {short(problem, 400)}{hint}") from None


def write_yaml(data: Any) -> str:
    """Plain data as YAML: block style at the top, flow style below."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=110, default_flow_style=None)
    return text


class _Dumper(yaml.SafeDumper):
    """Block style at the top, flow style below, no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Loader(yaml.SafeLoader):
    """The safe loader without anchors (they are what YAML bombs are made of), tags, huge numbers and repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML is annotated in part
        problem = None
        if isinstance(event, yaml.AliasEvent):
            problem = "aliases are not allowed in a plan; write the value out"
        elif getattr(event, "tag", None) is not None:
            problem = f"the tag {short(event.tag)!r} is not allowed in a plan; write the value without it"
        if problem is not None:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        node: Any = super().compose_node(parent, index)
        if node.tag.endswith((":int", ":float")) and len(node.value) > MAX_DIGITS:
            problem = f"number {short(node.value)!r} has {len(node.value)} characters; write at most {MAX_DIGITS}"
            raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def explain(error: ValidationError, root: Any, source: str) -> str:
    """One line per finding: file, line, field, what was found and what was expected; the first ``MAX_FINDINGS``."""
    lines = []
    line_of = _LineFinder(root)
    findings = error.errors(include_url=False)
    for finding in findings[:MAX_FINDINGS]:
        field = [
            part
            for part in finding["loc"]
            if not (isinstance(part, str) and part.startswith(("function-", "constrained-")))
        ]
        found = finding.get("input")
        shown = f"; {CUT_SHORT}" if finding["type"] == "missing" else f" (found {short(found)!r})"
        message = short(finding["msg"].removeprefix("Value error, "), 400)
        if finding["type"] == "extra_forbidden":
            message, shown = "unknown field; remove it or check its spelling", ""
        name = short(".".join(map(str, field)) or "top", 200)
        lines.append(f"{source}, line {line_of(field)}, field {name}: {message}{shown}")
    if len(findings) > MAX_FINDINGS:
        lines.append(f"{source}: {len(findings) - MAX_FINDINGS} more findings are not shown; mend these first")
    return "\n".join(lines)


class _LineFinder:
    """Says where parts of a plan stand in its YAML node tree; each mapping is read once."""

    def __init__(self, root: Any) -> None:
        self.root = root
        self._entries: dict[int, dict[str, tuple[Any, Any]]] = {}

    def __call__(self, field: Sequence[Any]) -> int:
        """The line (from 1) of the deepest part of ``field`` that the tree has."""
        node = self.root
        line = node.start_mark.line + 1
        for part in field:
            if isinstance(node, yaml.MappingNode):
                found = self._children(node).get(str(part))
                if found:
                    line, node = found[0].start_mark.line + 1, found[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line + 1
        return int(line)

    def _children(self, node: yaml.MappingNode) -> dict[str, tuple[Any, Any]]:
        if id(node) not in self._entries:
            self._entries[id(node)] = {key.value: (key, value) for key, value in node.value}
        return self._entries[id(node)]


def number_ranges(text: str | int, what: str, limit: int) -> list[range]:
    """The ranges, not yet expanded, that a text such as ``"3, 5-6"`` names; ``what`` is how errors name them.

    Raises:
        ValueError: the text is not a list of numbers and ranges, or names more than ``limit`` numbers.
    """
    ranges: list[range] = []
    total = 0
    for part in str(text).split(","):
        found = re.fullmatch(r"\s*(\d{1,5})(?:\s*-\s*(\d{1,5}))?\s*", part)
        if not found:
            raise ValueError(f"{what} {short(text)!r} should be numbers and ranges such as '3, 5-7'")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise ValueError(f"{what} {short(text)!r} has a range that runs backwards: {part.strip()!r}")
        ranges.append(range(first, last + 1))
        total += last + 1 - first
        if total > limit:
            raise ValueError(f"{what} {short(text)!r} are over the limit of {limit}; name each once")
    return ranges


def short(value: Any, limit: int = 80) -> str:
    """``value`` as text of at most ``limit`` characters, for messages."""
    text = str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def write_text_atomically(path: Path, text: str) -> None:
    """``write_atomically`` of a text, in UTF-8."""
    write_atomically(path, text.encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary neighbour of ``path`` and rename it into place.

    Raises:
        PlanError: the folder is missing or not writable.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # made by open, so that the umask counts
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except IsADirectoryError:
        raise PlanError(f"{path}: is a folder; give the name of a file in it") from None
    except OSError as error:
        raise PlanError(
            f"{path}: cannot be written: {error.strerror or error}; choose a folder that exists and is writable"
        ) from error
    finally:
        with suppress(OSError):  # an interrupted writing leaves nothing behind
            partial.unlink(missing_ok=True)
