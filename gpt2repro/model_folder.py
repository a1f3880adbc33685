"""Model folders: what `from_pretrained` opens, and what is pushed to the Hub."""

import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from gpt2repro.errors import UserError


def find_model(name: str) -> str:
    """The model that a user means by `name`: a run's model folder, a model folder, or else a Hub id.

    Raises:
        UserError: a folder without a model in it, or neither a folder nor a Hub id.
    """
    folder = Path(name)
    for candidate in (folder / "model", folder):
        if (candidate / "config.json").is_file():
            return str(candidate)
    if folder.exists():
        unfinished = " (the run has not finished yet)" if (folder / "recipe.yaml").exists() else ""
        raise UserError(f"{name} holds no model: neither config.json nor model/config.json is there{unfinished}")
    if name.count("/") > 1 or name.startswith((".", "/")):
        raise UserError(f"{name} does not exist; give a model folder, a run folder or a Hub id")
    return name


def save_model_folder(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, card: str) -> None:
    """Write weights, code, tokenizer, generation defaults and model card (README.md), complete or not at all."""
    temporary = folder.with_name("writing_" + folder.name)
    shutil.rmtree(temporary, ignore_errors=True)
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, do_sample=True, top_k=50
    )
    model.save_pretrained(temporary)
    tokenizer.model_max_length = config.n_positions
    tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(card)
    shutil.rmtree(folder, ignore_errors=True)  # an earlier export of the same run
    temporary.rename(folder)


def model_card(title: str, facts: dict[str, str]) -> str:
    """README.md of a model folder: metadata, what the model is, how to load it."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, gpt2repro]
---

# {title}

GPT-2's architecture, trained with gpt2repro.

| | |
| --- | --- |
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_REPO", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPO")
```
"""


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or Hub id.

    Raises:
        UserError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} holds no tokenizer ({str(error).splitlines()[0]})") from error


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int, seed: int
) -> list[str]:
    """A continuation of each prompt, prompt included, sampled from the 50 likeliest tokens.

    The random state that training uses is left as it was.
    """
    was_training = model.training
    model.eval()
    eos = model.config.eos_token_id
    texts = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
            room = model.config.n_positions - ids.shape[1]
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=min(max_new_tokens, room),
                do_sample=True, top_k=50, pad_token_id=eos,
            )  # fmt: skip
            texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    model.train(was_training)
    return texts
