"""One line to type for each verb, shown below its help."""

from __future__ import annotations

EXAMPLES: dict[str, str] = {
    "train": "hf-continual train --model Qwen/Qwen2.5-0.5B --train law.jsonl --methods '{replay: {rows: old.jsonl, ratio: 0.1}}'",
    "run": "hf-continual run plan.yaml --dry-run",
    "score": "hf-continual score out/law --test law.test.jsonl --metric exact_match",
    "chat": "hf-continual chat out/law --prompt 'What is a lien?'",
    "methods": "hf-continual methods --json",
    "push": "hf-continual push out/law me/law --dry-run",
    "demo": "hf-continual demo --out demo-out",
}


def example(verb: str) -> str:
    """The line for the end of a verb's help."""
    return f"Example: {EXAMPLES[verb]}"
