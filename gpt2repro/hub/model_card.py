"""The model card, README.md of a model folder: what a run recorded of itself. What was not measured is left out."""

import math
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from gpt2repro.evaluation.hellaswag import FULL_SET, HUB_ID, OPENAI_GPT2, with_error
from gpt2repro.train.telemetry import exported_step, read_metrics


# of recipe.yaml: told in the table, or paths of the machine that it ran on
NOT_SHOWN = ("data", "versions", "hardware", "data_dir", "output_dir", "hellaswag_data")


def model_card(
    model: PreTrainedModel,
    name: str,
    repo_id: str | None = None,
    run_dir: Path | None = None,
    last_step: int | None = None,
    license: str | None = None,
) -> ModelCard:
    """The card of a model of ours or of its export as GPT2LMHeadModel.

    Args:
        name: the title.
        repo_id: where on the Hub it will be; None: not known, or nowhere.
        run_dir: the run that trained it, with recipe.yaml and metrics.jsonl; None where there is no record.
        last_step: the step of the checkpoint that it is; None: it is what the run has exported.
        license: of the weights, as the Hub abbreviates it; None: as the run's recipe says, or nothing.
    """
    record: dict = {}
    metrics: dict = {}
    if run_dir:
        record = yaml.safe_load((run_dir / "recipe.yaml").read_text())
        rows = read_metrics(run_dir / "metrics.jsonl")
        last_step = exported_step(rows, record) if last_step is None else last_step
        rows = [row for row in rows if row["step"] <= last_step]
        for row in rows:  # of this very model: an earlier step's validation is not its own
            metrics |= row if row["step"] == rows[-1]["step"] else {}
    results = _results(metrics, record)
    license = license or record.get("license")
    metadata = _metadata(name, license, record, metrics, results)
    load_from = repo_id or "PATH_OR_REPO"
    remote_code = "" if model.config.model_type == "gpt2" else ", trust_remote_code=True"
    lines = [
        f"# {name}",
        'GPT-2\'s architecture (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), '
        f"{'trained' if record else 'converted'} with gpt2repro.",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{load_from}"{remote_code})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{load_from}"{remote_code})\n```',
        _table(["", ""], list(_facts(model, record, metrics).items())),
    ]
    if results:
        beside = OPENAI_GPT2 if metrics.get("hellaswag_items") == FULL_SET else {}
        scores = [[title, shown, beside.get(key, "")] for key, (title, _, shown) in results.items()]
        lines += ["## Evaluation", _table(["", "this model", "OpenAI's gpt2 (124M)"], scores)]
    if "hellaswag_items" in metrics:
        lines += [
            f"HellaSwag: {metrics['hellaswag_items']:,} items of the validation set, zero-shot, the ending with the "
            "lowest loss (acc: summed, acc_norm: mean per token), with standard errors. OpenAI's: build-nanogpt's "
            "figures by the same rule on all 10,042 items."
        ]
    if "loss" in metrics:
        lines += ["![training and validation loss](loss.png)"]
    if record:
        settings = {name: value for name, value in record.items() if name not in NOT_SHOWN}
        settings |= {"corpus": _public(record["corpus"])} if "corpus" in record else {}
        settings |= {"init_from": _started_from(record)}
        lines += ["## Recipe", f"```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```"]
    if license:
        lines += ["## Licence", f"{license}, for the weights. The text that they were trained on keeps its own terms."]
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n")


def _metadata(name: str, license: str | None, record: dict, metrics: dict, results: dict) -> ModelCardData:
    """What the Hub reads: the head of the card."""
    data = record.get("data", {})
    hub = data.get("corpus", {}) if data.get("corpus", {}).get("revision") else {}
    return ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "gpt2repro"],
        datasets=[s["corpus"]["hub_id"] for s in _sources(data) if s["corpus"].get("revision")] or None,
        base_model=_hub_id_in_full(record.get("base_model")),
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                **(
                    {"dataset_type": HUB_ID, "dataset_name": "HellaSwag", "dataset_split": "validation"}
                    if key in OPENAI_GPT2
                    else {
                        "dataset_type": hub.get("hub_id", "text"),
                        "dataset_name": f"{_public(data['corpus']['name'])}, held out",
                        "dataset_config": hub.get("config"),
                        "dataset_revision": hub.get("revision"),
                    }
                ),
                metric_type=key.removeprefix("hellaswag_"),
                metric_name=title,
                metric_value=round(value, 6),
            )
            for key, (title, value, _) in results.items()
            # not the training loss, nor HellaSwag on a sample
            if key != "loss" and (key not in OPENAI_GPT2 or metrics["hellaswag_items"] == FULL_SET)
        ]
        or None,
    )


def _facts(model: PreTrainedModel, record: dict, metrics: dict) -> dict[str, str]:
    config = model.config
    real = getattr(config, "unpadded_vocab_size", config.vocab_size)
    padding = f" and {config.vocab_size - real} padding rows" if config.vocab_size > real else ""
    facts = {
        "architecture": f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, {config.n_positions} "
        f"positions, {real:,} tokens{padding}, {model.num_parameters():,} parameters"
    }
    if not record:
        return facts
    data = record["data"]
    facts["data"] = (
        f"{' + '.join(map(_origin, _sources(data)))}: {data['splits']['train']['tokens']:,} training tokens by the "
        f"tokenizer {_public(data['tokenizer']['name'])}; sha256 of the manifest {data['manifest_sha256']}"
    )
    if "tokens" in metrics:
        growing = "up to " if record.get("batch_ramp_start") else ""
        facts["training"] = f"{metrics['step']:,} steps of {growing}{record['global_batch_tokens']:,} tokens, " + (
            f"{metrics['tokens']:,} in all, starting from {_started_from(record)}"
        )
    if "hardware" in record:
        facts["hardware"] = record["hardware"]
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    return facts


def _sources(data: dict) -> list[dict]:
    """The records of the directories of a mixture, or of the one directory."""
    return data.get("sources", [data] if data else [])


def _origin(source: dict) -> str:
    corpus = source["corpus"]
    on_hub = corpus.get("revision")  # a local folder has none
    origin = ", ".join(str(corpus[key]) for key in ("hub_id", "config", "revision") if on_hub and corpus.get(key))
    return (f"{100 * source['weight']:g}% " if "weight" in source else "") + (origin or _public(corpus["name"]))


def _results(metrics: dict, record: dict) -> dict[str, tuple[str, float, str]]:
    """Metric type -> its title, its value, and the value as the table shows it."""
    results = {}
    if metrics.get("loss") is not None:  # no update was made there
        results["loss"] = ("training loss, last row, nats per token", metrics["loss"], f"{metrics['loss']:.4f}")
    if "val_loss" in metrics:
        loss, val = metrics["val_loss"], record["data"]["splits"]["val"]
        results["val_loss"] = ("validation loss, nats per token", loss, f"{loss:.4f}")
        results["perplexity"] = ("validation perplexity", math.exp(loss), f"{math.exp(loss):.2f}")
        if val["bytes"]:  # not known of a mixture, nor of other trainers' tokens
            bits_per_byte = loss / math.log(2) * val["tokens"] / val["bytes"]
            results["bits_per_byte"] = ("validation, bits per byte", bits_per_byte, f"{bits_per_byte:.4f}")
    for key, loss in metrics.items():
        if key.startswith("val_loss_"):  # of one source of a mixture
            results[key] = (f"validation loss on {key.removeprefix('val_loss_')}, nats per token", loss, f"{loss:.4f}")
    for key in OPENAI_GPT2:
        if key in metrics:
            shown = with_error(metrics[key], metrics[f"{key}_stderr"])
            results[key] = (f"HellaSwag {key.removeprefix('hellaswag_')}", metrics[key], shown)
    return results


def _hub_id_in_full(name: str | None) -> str | None:
    return f"openai-community/{name}" if name and "/" not in name else name


def _started_from(record: dict) -> str:
    return record.get("base_model") or _public(record.get("init_from", "scratch"))


def _public(name: str) -> str:
    """A Hub id or a plain name as it is; of a path on the machine that it ran on, the last part."""
    return Path(name).name if name.startswith((".", "/", "~")) or name.count("/") > 1 else name


def _table(head: list[str], rows: list) -> str:
    table = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in row)} |" for row in table)
