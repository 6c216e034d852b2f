"""What differs between two plans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditopt.decisions import decision_to_data
from ditopt.plan import Plan, Rule, format_steps


def diff_plans(old: Plan, new: Plan) -> list[str]:
    """What changed from ``old`` to ``new``, a line each; empty if nothing did."""
    lines = []
    before, after = old.to_data(), new.to_data()
    for key in dict.fromkeys([*before, *after]):
        if key != "rules":
            lines += _diff_values(key, before.get(key), after.get(key))
    old_rules = [_rule_text(rule) for rule in old.rules]
    new_rules = [_rule_text(rule) for rule in new.rules]
    lines += [f"- rule {text}" for text in old_rules if text not in new_rules]
    lines += [f"+ rule {text}" for text in new_rules if text not in old_rules]
    return lines


def _diff_values(name: str, before: Any, after: Any) -> list[str]:
    if before == after:
        return []
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        return [
            line
            for key in dict.fromkeys([*before, *after])
            for line in _diff_values(f"{name}.{key}", before.get(key), after.get(key))
        ]
    return [f"~ {name}: {before} -> {after}"]


def _rule_text(rule: Rule) -> str:
    network = "" if rule.network == "*" else f" [{rule.network}]"
    return f"{rule.place} @ {format_steps(rule.steps)}{network}: {decision_to_data(rule.do)}"
