"""The model card of an export: what the weights are, and everything that they descend from."""

from __future__ import annotations

from llm.data.tokenizer import Tokenizer
from llm.estimate.parameters import parameter_count
from llm.tools.export import Exported
from llm.utils.config import ModelConfig


def model_card(source: Exported, config: ModelConfig, tokenizer: Tokenizer) -> str:
    """A README.md with the metadata that model hubs read, and the lineage as a table."""
    manifest = source.manifest
    state = manifest.state
    rows: dict[str, object] = {
        "run": source.storage.url.rstrip("/").rpartition("/")[2],
        "checkpoint": manifest.commit.path,
        "step": manifest.step,
        "tokens trained on": state.get("tokens"),
        "descends from": manifest.parent or "nothing",
        "SHA-256 of the manifest": manifest.sha256,
        "code": manifest.code,
        "tokenizer": f"{tokenizer.name.rpartition('/')[2]}, SHA-256 {tokenizer.sha256}",
        "data": _short(state.get("data")),
        "fine-tuned from": _short(state.get("base")),
        "imported from": _short((state.get("imported") or {}).get("from")),
    }
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items() if value not in (None, ""))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [llmops]
---

# {_cell(config.name)}

A decoder of {parameter_count(config):,} parameters: {config.n_layers} layers of width {config.dim}, \
{config.n_heads} heads ({config.n_kv_heads} of keys and values), vocabulary {config.vocab_size:,}, \
{config.max_seq_len:,} positions.

## Where these weights are from

| | |
|---|---|
{table}
"""


def _short(value: object) -> str | None:
    """One line of anything; addresses lose what may be a password."""
    if not value:
        return None
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(each)}" for key, each in value.items() if each not in (None, "", {}, []))
    return str(value)


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
