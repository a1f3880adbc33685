"""Runs as they log themselves, written out: their records and the rows of their metrics."""

import dataclasses
import json
from pathlib import Path

import yaml
from support import ROOT

from gpt2repro.evaluation.reference_curves import ReferenceCurve
from gpt2repro.recipe_file import parse_recipe
from modeling_gpt2repro import GPT2ReproConfig


STEP = 524_288  # tokens
FINEWEB = {
    "corpus": {"name": "fineweb", "hub_id": "HuggingFaceFW/fineweb", "config": "sample-10BT", "revision": "0a1"},
    "tokenizer": {"name": "gpt2", "vocab_size": 50257},
    "splits": {"train": {"tokens": 10_200_000_000}, "val": {"tokens": 100_000_000}},
}
SHAKESPEARE = {
    "corpus": {"name": "shakespeare-char"},
    "tokenizer": {"name": "char", "vocab_size": 65},
    "splits": {"train": {"tokens": 1_003_854}, "val": {"tokens": 111_540}},
}


def record_of(recipe: str, data: dict, **fields) -> dict:
    """What recipe.yaml records of a run of one of recipes/."""
    path = ROOT / "recipes" / f"{recipe}.yaml"
    resolved, problems = parse_recipe(["--config", str(path)], path, GPT2ReproConfig)
    assert not problems
    return dataclasses.asdict(dataclasses.replace(resolved, **fields)) | {"data": data}


def fineweb_record(**fields) -> dict:
    return record_of("gpt2-124m-fineweb", FINEWEB, **fields)


def rows_like(
    curve: ReferenceCurve, above: float = 0.0, until: int = 10**12, tokens_per_step: int = STEP
) -> list[dict]:
    """The validations of a run whose losses are those of the curve and some more."""
    return [
        {"step": tokens // tokens_per_step, "tokens": tokens, "val_loss": loss + above}
        for tokens, loss in zip(curve.tokens, curve.losses)
        if tokens <= until
    ]


def write_run(folder: Path, record: dict, rows: list[dict]) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
