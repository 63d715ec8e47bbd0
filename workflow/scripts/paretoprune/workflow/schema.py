"""The JSON schema of a configuration, and its reference for readers, both from the classes of the settings.

`make schema` writes `workflow/schemas/config.schema.yaml`, which editors can check a file against
while it is written, and `docs/configuration.md`. The workflow itself makes the schema anew whenever it starts.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from paretoprune.importance.allocation import ALLOCATIONS, STARTS
from paretoprune.importance.registry import SCORE_NEEDS
from paretoprune.repair.registry import REPAIR_REFITS
from paretoprune.settings import REFIT_GUIDE, Method, Settings
from paretoprune.workflow.configuration import RENAMED
from paretoprune.workflow.sections import NAME, OWN_KEYS, Configuration, Dataset, Training

SCHEMA_FILE, REFERENCE_FILE = Path("workflow/schemas/config.schema.yaml"), Path("docs/configuration.md")
# Names in registries of rooms that the settings stand below.
NAMES: dict[str, tuple[str | None, ...]] = {
    "allocations": tuple(ALLOCATIONS),
    "starts": tuple(STARTS),
    "scores": tuple(SCORE_NEEDS),
    "guides": (*SCORE_NEEDS, REFIT_GUIDE),
    "repairs": tuple(REPAIR_REFITS),
    "search_repairs": (*REPAIR_REFITS, None),
}


def configuration_schema() -> dict[str, Any]:
    """The JSON schema of a whole configuration."""
    schema = _group(Configuration, complete=True)
    # Configurations from before there were these sections go on working.
    for section in ("report", "latency"):
        schema["required"].remove(section)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Configuration of paretoprune",
        **schema,
    }


def _group(kind: type[Settings], *, complete: bool) -> dict[str, Any]:
    """The schema of a group of settings; a complete one has all its keys, any other those without a default."""
    types = get_type_hints(kind)
    needed = [one.name for one in fields(kind) if complete or not _has_default(one)]
    schema: dict[str, Any] = {"type": "object", "additionalProperties": False}
    if needed:
        schema["required"] = needed
    schema["properties"] = {one.name: _value(one, types[one.name]) for one in fields(kind)}
    if kind is Dataset:
        schema["if"] = {"properties": {"source": {"enum": list(OWN_KEYS)}}}
        schema["then"] = {"required": ["path"]}
    return schema


def _value(one: Field[Any], annotation: Any) -> dict[str, Any]:
    """The schema of a field."""
    rule = _rule(one)
    meaning = {"description": one.metadata["description"]}
    inner = _inner(annotation)
    if inner is None:
        return {**meaning, **rule}
    if get_origin(annotation) is Mapping:
        each = _group(inner, complete=False)
        return {**meaning, "type": "object", "propertyNames": NAME, "additionalProperties": each, **rule}
    if get_origin(annotation) is Sequence:
        return {**meaning, **rule, "items": _group(inner, complete=False)}
    return {**meaning, **_group(inner, complete=not _has_default(one)), **rule}


def _rule(one: Field[Any]) -> dict[str, Any]:
    """The JSON schema of a field's values, with names from registries filled in."""
    rule = dict(one.metadata["rule"])
    if "names" in rule:
        names = {"enum": list(NAMES[rule.pop("names")])}
        rule |= {"items": names} if rule.get("type") == "array" else names
    return rule


def default_of(one: Field[Any]) -> Any:
    """The default of a setting as a plain value; `dataclasses.MISSING` where there is none."""
    return list(one.default) if isinstance(one.default, tuple) else one.default


def _has_default(one: Field[Any]) -> bool:
    return one.default is not MISSING or one.default_factory is not MISSING


def _inner(annotation: Any) -> type[Settings] | None:
    """The group of settings that a field holds, one or several of; None for a plain value."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, Settings):
            return part
    return None


# For readers

HEAD = """# Configuration

Every key of `config.yaml`: its default, what it may be, and what it means. This page is written by
`make schema` from the classes in `settings.py` and `workflow/sections.py` of the package.

A file given with `--configfile` is laid over `config.yaml` key by key. Lists are replaced as a whole. A key without a
default must be given, unless its meaning says when. A dot joins a key to the group it stands in. `<name>` is a name of
your choice.
"""


class _Dumper(yaml.SafeDumper):
    """Writes what occurs several times in full each time."""

    def ignore_aliases(self, data: Any) -> bool:
        """Never an alias."""
        return True


def schema_text() -> str:
    """The schema as a YAML file."""
    head = "# Written by `make schema` from the settings in workflow/scripts/paretoprune.\n"
    return head + yaml.dump(configuration_schema(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def reference_text() -> str:
    """The table of all keys as a Markdown page."""
    types = get_type_hints(Configuration)
    plain = [one for one in fields(Configuration) if _inner(types[one.name]) is None]
    parts = [HEAD, *_table("For everything", None, (row for one in plain for row in _rows(one, types[one.name], "")))]
    for one in fields(Configuration):
        if one not in plain:
            parts += _table(f"`{one.name}`", one.metadata["description"], _rows(one, types[one.name], ""))
    old = (f"| `{before}` | `{after}` |" for before, after in RENAMED.items())
    parts += ["## Names that have changed\n", "The old ones of `search` and `method_settings` go on working.\n"]
    parts += ["| old | new |\n| --- | --- |", *old]
    return "\n".join(parts) + "\n"


def _table(title: str, about: str | None, rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    opening = [f"## {title}\n", *([f"{about[0].upper()}{about[1:]}.\n"] if about else [])]
    return [*opening, "| key | default | values | meaning |\n| --- | --- | --- | --- |", *lines, ""]


def _rows(one: Field[Any], annotation: Any, prefix: str) -> Iterator[tuple[str, ...]]:
    """Key, default, values and meaning of a field and all that stands in it."""
    inner, path = _inner(annotation), f"{prefix}{one.name}"
    if inner is None:
        yield f"`{path}`", _default_text(one), _values_text(_rule(one)), one.metadata["description"]
        return
    if inner is Training and prefix:
        yield f"`{path}`", "", "any keys of `training`", one.metadata["description"]
        return
    if "pattern" in one.metadata["rule"]:
        # A group that a name can stand for.
        yield f"`{path}`", _default_text(one), _values_text(_rule(one)), one.metadata["description"]
    path += {Mapping: ".<name>", Sequence: "[]"}.get(get_origin(annotation), "")
    # A method may have anything that `search` has.
    common = {field.name for field in fields(Method)} if issubclass(inner, Method) and inner is not Method else set()
    types = get_type_hints(inner)
    for field in fields(inner):
        if field.name not in common:
            yield from _rows(field, types[field.name], f"{path}.")
    if common:
        yield f"`{path}.…`", "", "any keys of `search`, but `objectives`", "what differs for this method"


def _default_text(one: Field[Any]) -> str:
    # A key that may not be null can be left out.
    if one.default is MISSING or (one.default is None and "null" not in _values_text(_rule(one))):
        return ""
    text = yaml.safe_dump(default_of(one), default_flow_style=True, width=10**6)
    return f"`{text.removesuffix(chr(10)).removesuffix('...').strip()}`"


def _values_text(rule: Mapping[str, Any]) -> str:
    """What a JSON schema allows, in words."""
    if "enum" in rule:
        return ", ".join("null" if one is None else str(one) for one in rule["enum"])
    if "oneOf" in rule:
        return " or ".join(_values_text(one) for one in rule["oneOf"])
    if "const" in rule:
        return str(rule["const"])
    kinds = rule["type"] if isinstance(rule["type"], list) else [rule["type"]]
    return " or ".join(_kind_text(kind, rule) for kind in kinds)


def _kind_text(kind: str, rule: Mapping[str, Any]) -> str:
    if kind == "array":
        first = "".join(f"one of: {_values_text(one)}; then " for one in rule.get("prefixItems", ()))
        return f"{first}list of: {_values_text(rule['items'])}"
    if kind not in ("integer", "number"):
        return {"string": "text", "object": "a mapping", "boolean": "true, false"}.get(kind, kind)
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {rule[key]}" for key, sign in signs.items() if key in rule]
    return " ".join([{"integer": "whole number", "number": "number"}[kind], ", ".join(bounds)]).strip()


def main(root: Path = Path()) -> None:
    """Write both files.

    Args:
        root: The folder of the repository.
    """
    for file, text in ((SCHEMA_FILE, schema_text()), (REFERENCE_FILE, reference_text())):
        (root / file).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
