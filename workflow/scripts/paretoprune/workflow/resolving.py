"""A configuration as it was typed, brought to the types and paths that are meant."""

import os
import re
from collections.abc import Mapping
from typing import Any

import jsonschema
import yaml

# A number, or a word of JSON.
PLAIN = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[Tt]rue|[Ff]alse|null")


def resolved(config: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a configuration in which texts that stand for other types have them, and `~` is the home folder.

    Snakemake hands nested values of `--config` over as text, and YAML takes `1e-3` for one. What cannot be brought to
    its type stays as it is, for the check to name.

    Args:
        config: The merged configuration.
        schema: The JSON schema, from `workflow.schema.configuration_schema`.
    """
    typed: dict[str, Any] = _typed(config, schema)
    for key in ("results_directory", "data_directory"):
        path = typed.get(key)
        if isinstance(path, str) and path:
            # Snakemake joins paths as texts, so that a slash at the end or `./` would make other names of one file.
            typed[key] = os.path.normpath(expanded(path))
    return typed


def expanded(path: str) -> str:
    """A path with the home folder for `~` and the values of variables for `$NAME`; what is not known stays."""
    return os.path.expanduser(os.path.expandvars(path))  # noqa: PTH111  (that of pathlib refuses unknown users)


def _typed(value: Any, rule: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping):
        known, others = rule.get("properties", {}), rule.get("additionalProperties")
        others = others if isinstance(others, Mapping) else {}
        return {key: _typed(inner, known.get(key, others)) for key, inner in value.items()}
    if isinstance(value, list):
        first, rest = rule.get("prefixItems", []), rule.get("items")
        rest = rest if isinstance(rest, Mapping) else {}
        return [_typed(inner, first[i] if i < len(first) else rest) for i, inner in enumerate(value)]
    if isinstance(value, str) and not rule:
        # Arguments of networks may be anything: plain numbers, yes and no have no other spelling on the command line.
        return _parsed(value) if PLAIN.fullmatch(value) else value
    if value == "null" and _is_valid(None, rule):
        return None  # also where any text will do, as for a file: Snakemake hands over the word
    if isinstance(value, float) and value.is_integer() and _means_integer(value, rule):
        return int(value)
    if not isinstance(value, str) or _is_valid(value, rule):
        return value
    parsed = _parsed(value)
    if isinstance(parsed, Mapping | list):
        return _typed(parsed, rule)
    kinds = rule.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if isinstance(parsed, float) and parsed.is_integer() and ("integer" in kinds or _means_integer(parsed, rule)):
        parsed = int(parsed)
    is_number = isinstance(parsed, int | float) and not isinstance(parsed, bool)
    # A number out of its range is still a number: the check then speaks of the range.
    fits = _is_valid(parsed, rule) or (is_number and not {"integer", "number"}.isdisjoint(kinds))
    return parsed if fits else value


def _means_integer(value: float, rule: Mapping[str, Any]) -> bool:
    """Whether a number like 1e2 stands where a whole one belongs, which may also be one of several choices."""
    choices = [rule, *rule.get("anyOf", []), *rule.get("oneOf", [])]
    return any(choice.get("type") == "integer" and _is_valid(value, choice) for choice in choices)


def _is_valid(value: Any, rule: Mapping[str, Any]) -> bool:
    return bool(jsonschema.Draft202012Validator(rule).is_valid(value))


def _parsed(text: str) -> Any:
    """A text as YAML reads it, and numbers like 1e-3, which it does not."""
    try:
        value = yaml.safe_load(text)
        return float(value) if isinstance(value, str) else value
    except (yaml.YAMLError, ValueError):
        return text
