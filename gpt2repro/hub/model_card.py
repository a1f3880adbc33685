"""The model card, README.md of a model folder, from what the run recorded. What was not measured is left out."""

from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from gpt2repro.data.manifest import corpus_title
from gpt2repro.data.token_stream import bits_per_byte, perplexity, perplexity_text
from gpt2repro.evaluation import scorecard_views
from gpt2repro.evaluation.bootstrap import with_error
from gpt2repro.evaluation.hellaswag_items import FULL_SET, HUB_ID
from gpt2repro.evaluation.published import openai_models, published_score
from gpt2repro.models.padding import without_padding
from gpt2repro.run_folder import RunFolder
from gpt2repro.show.public import origin, public_name, public_settings, sources_of, started_from
from gpt2repro.train.metrics import exported_step, read_metrics


HELLASWAG = ("hellaswag_acc", "hellaswag_acc_norm")  # keys of metrics.jsonl
THIS_MODEL = "this model"  # its name in the part of a scorecard that is published


@dataclass(frozen=True)
class Result:
    """A score of the model.

    key: its name in metrics.jsonl; `perplexity` and `bits_per_byte` are derived from val_loss.
    title: for readers, with the unit.
    shown: the value as the table prints it.
    """

    key: str
    title: str
    value: float
    shown: str


def model_card(
    model: PreTrainedModel,
    name: str,
    repo_id: str | None = None,
    run: RunFolder | None = None,
    last_step: int | None = None,
    license: str | None = None,
    scorecard: dict[str, Any] | None = None,
    gguf: str | None = None,
) -> ModelCard:
    """The card of one of our models, or of its export as GPT2LMHeadModel or to a GGUF file.

    Args:
        name: the title.
        repo_id: its repository on the Hub; None: unknown, or not on the Hub.
        run: the run that trained it; None: there is no record of one.
        last_step: the checkpoint's step if the model is a checkpoint; None: it is the run's exported model.
        license: of the weights, as the Hub abbreviates it; None: what the run's recipe says, if anything.
        scorecard: what a scorecard says of this model, see `public_part` in evaluation/scorecard.py.
        gguf: the name of the GGUF file that it is of; None: it is of a folder for transformers.
    """
    model = without_padding(model)  # as it is saved
    record: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    if run is not None:
        record = run.read_record()
        if run.metrics.is_file():  # absent before the first step
            metrics = _metrics_of_step(read_metrics(run.metrics), record, last_step)
    if scorecard is not None and _measures(scorecard, "hellaswag"):
        metrics = {key: value for key, value in metrics.items() if not key.startswith("hellaswag_")}
    results = _results(metrics, record)
    license = license or record.get("license")
    metadata = _metadata(name, license, record, metrics, results, scorecard)
    if gguf:
        metadata.library_name = "gguf"
    sections = [
        f"# {name}",
        'GPT-2\'s architecture (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), '
        f"{'trained' if record else 'converted'} with gpt2repro.",
        _gguf_usage(gguf, repo_id) if gguf else _usage(model, repo_id or "PATH_OR_REPO"),
        _table(["", ""], _facts(model, record, metrics)),
        *_evaluation(results, metrics),
        *_scorecard_sections(scorecard),
    ]
    if "loss" in metrics:
        sections.append("![training and validation loss](loss.png)")
    if record:
        sections += ["## Recipe", f"```yaml\n{yaml.safe_dump(public_settings(record), sort_keys=False)}```"]
    if license:
        terms = "The training text keeps its own terms."
        sections += ["## License", f"{license}, for the weights. {terms}"]
    body = "\n\n".join(sections)
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n")


def _metrics_of_step(rows: list[dict], record: dict[str, Any], last_step: int | None) -> dict[str, Any]:
    """Everything measured at the model's own step; an earlier step's validation was of other weights."""
    step = exported_step(rows, record) if last_step is None else last_step
    logged = [row for row in rows if row["step"] <= step]
    metrics: dict[str, Any] = {}
    for row in logged:
        if row["step"] == logged[-1]["step"]:
            metrics.update(row)
    return metrics


# ---- sections ----


def _usage(model: PreTrainedModel, load_from: str) -> str:
    is_plain = model.config.model_type == "gpt2"
    remote_code = "" if is_plain else ', revision="COMMIT", trust_remote_code=True'
    about_code = (
        "\n\nThis runs the repository's code: give a commit whose `modeling_gpt2repro.py` you have read, as without "
        "`revision` a later one runs unread. Needs transformers 5.17 or later and torch 2.11 or later."
    )
    # AutoTokenizer reads the model's configuration first, and asks whether to run its code.
    tokenizer = "AutoTokenizer" if is_plain else "PreTrainedTokenizerFast"
    return (
        f"```python\nfrom transformers import AutoModelForCausalLM, {tokenizer}\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{load_from}"{remote_code})\n'
        f'tokenizer = {tokenizer}.from_pretrained("{load_from}")\n```{"" if is_plain else about_code}'
    )


def _gguf_usage(file: str, repo_id: str | None) -> str:
    model = f'Llama.from_pretrained("{repo_id}", "{file}")' if repo_id else f'Llama("{file}")'
    return (
        "For llama.cpp and what is built on it. In Python, with llama-cpp-python:\n\n"
        f"```python\nfrom llama_cpp import Llama\n\nmodel = {model}\n"
        'print(model("Once upon a time", max_tokens=100)["choices"][0]["text"])\n```'
    )


def _facts(model: PreTrainedModel, record: dict[str, Any], metrics: dict[str, Any]) -> list[list[str]]:
    """Rows of the first table: what the model is and how it was made."""
    config = model.config
    architecture = (
        f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, {config.n_positions} positions, "
        f"{config.vocab_size:,} tokens, {model.num_parameters():,} parameters"
    )
    facts = [["architecture", architecture]]
    if not record:
        return facts
    data = record["data"]
    origins = " + ".join(origin(source) for source in sources_of(data))
    facts.append(
        [
            "data",
            f"{origins}: {data['splits']['train']['tokens']:,} training tokens of the tokenizer "
            f"{public_name(data['tokenizer']['name'])}; sha256 of the manifest {data['manifest_sha256']}",
        ]
    )
    if "tokens" in metrics:
        rank = record.get("lora_rank")
        adapter = f"; a LoRA adapter of rank {rank} was trained, which is merged into these weights" if rank else ""
        growing = "up to " if record.get("batch_ramp_start") else ""
        facts.append(
            [
                "training",
                f"{metrics['step']:,} steps of {growing}{record['global_batch_tokens']:,} tokens, "
                f"{metrics['tokens']:,} in all, starting from {started_from(record)}{adapter}",
            ]
        )
    if "hardware" in record:
        facts.append(["hardware", record["hardware"]])
    versions = [f"{package} {version}" for package, version in record["versions"].items() if version]
    facts.append(["versions", ", ".join(versions)])
    return facts


def _evaluation(results: list[Result], metrics: dict[str, Any]) -> list[str]:
    if not results:
        return []
    is_full_hellaswag = metrics.get("hellaswag_items") == FULL_SET
    beside = {key: _openai_hellaswag(key) for key in HELLASWAG} if is_full_hellaswag else {}
    rows = [[result.title, result.shown, beside.get(result.key, "")] for result in results]
    sections = ["## Evaluation", _table(["", "this model", f"OpenAI's {openai_models()['gpt2'].title}"], rows)]
    if "hellaswag_items" in metrics:
        sections.append(
            f"HellaSwag: {metrics['hellaswag_items']:,} items of the validation set, zero-shot, with standard errors. "
            "The prediction is the ending with the lowest loss (acc: summed, acc_norm: mean per token). OpenAI's "
            "scores are build-nanogpt's, by the same rule on all 10,042 items."
        )
    return sections


def _openai_hellaswag(key: str) -> float | str:
    """The published score of OpenAI's smallest model."""
    score = published_score("gpt2", key.replace("hellaswag", "hellaswag_completion"))
    return score.value if score else ""


def _scorecard_sections(card: dict[str, Any] | None) -> list[str]:
    if card is None:
        return []
    sentences = scorecard_views.bullets(card["sentences"])
    table, methods = scorecard_views.markdown_table(card), scorecard_views.markdown_methods(card)
    return [section for section in ("## Scorecard", sentences, table, methods) if section]


def _measures(card: dict[str, Any], task: str) -> bool:
    return any(metric["task"] == task for metric in card["metrics"])


def _results(metrics: dict[str, Any], record: dict[str, Any]) -> list[Result]:
    results = []
    if metrics.get("loss") is not None:  # None: no finite loss since the last row
        loss = metrics["loss"]
        results.append(Result("loss", "training loss, last row, nats per token", loss, f"{loss:.4f}"))
    if "val_loss" in metrics:
        loss, val = metrics["val_loss"], record["data"]["splits"]["val"]
        bits = bits_per_byte(loss, val["tokens"], val["bytes"])
        results.append(Result("val_loss", "validation loss, nats per token", loss, f"{loss:.4f}"))
        results.append(Result("perplexity", "validation perplexity", perplexity(loss), perplexity_text(loss)))
        if bits is not None:
            results.append(Result("bits_per_byte", "validation, bits per byte", bits, f"{bits:.4f}"))
    for key, value in metrics.items():
        if key.startswith("val_loss_"):  # one source of a mixture
            title = f"validation loss on {key.removeprefix('val_loss_')}, nats per token"
            results.append(Result(key, title, value, f"{value:.4f}"))
    for key in HELLASWAG:
        if key in metrics:
            title = f"HellaSwag {key.removeprefix('hellaswag_')}"
            results.append(Result(key, title, metrics[key], with_error(metrics[key], metrics[f"{key}_stderr"])))
    return results


# ---- metadata ----


def _metadata(
    name: str,
    license: str | None,
    record: dict[str, Any],
    metrics: dict[str, Any],
    results: list[Result],
    scorecard: dict[str, Any] | None,
) -> ModelCardData:
    """What the Hub reads: the YAML header of the card."""
    data = record.get("data", {})
    hub_ids = [source["corpus"]["hub_id"] for source in sources_of(data) if source["corpus"].get("revision")]
    has_full_hellaswag = metrics.get("hellaswag_items") == FULL_SET
    published = []
    for result in results:
        is_hellaswag = result.key in HELLASWAG
        is_training_loss = result.key == "loss"
        is_partial_hellaswag = is_hellaswag and not has_full_hellaswag
        if not is_training_loss and not is_partial_hellaswag:
            published.append(_hub_result(result, data, is_hellaswag))
    published += _benchmark_results(scorecard)
    return ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "gpt2repro"],
        datasets=hub_ids or None,
        base_model=_full_hub_id(record.get("base_model")),
        model_name=name,
        eval_results=published or None,
    )


def _hub_result(result: Result, data: dict[str, Any], is_hellaswag: bool) -> EvalResult:
    if is_hellaswag:
        dataset: dict[str, Any] = {"dataset_type": HUB_ID, "dataset_name": "HellaSwag", "dataset_split": "validation"}
    else:
        corpus = data["corpus"]
        on_hub = corpus if corpus.get("revision") else {}  # a local folder has no revision
        dataset = {
            "dataset_type": on_hub.get("hub_id", "text"),
            "dataset_name": f"{corpus_title(corpus)}, held out",
            "dataset_config": on_hub.get("config"),
            "dataset_revision": on_hub.get("revision"),
        }
    return EvalResult(
        task_type="text-generation",
        metric_type=result.key.removeprefix("hellaswag_"),
        metric_name=result.title,
        metric_value=round(result.value, 6),
        **dataset,
    )


def _benchmark_results(card: dict[str, Any] | None) -> list[EvalResult]:
    """The scorecard's results on whole benchmarks of the Hub."""
    if card is None:
        return []
    metrics = {metric["key"]: metric for metric in card["metrics"] if metric["data"]["complete"]}
    measured = [result for result in card["results"] if result["model"] == THIS_MODEL and result["metric"] in metrics]
    return [_benchmark_result(result["value"], metrics[result["metric"]]) for result in measured]


def _benchmark_result(value: float, metric: dict[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=metric["data"]["hub_id"],
        dataset_name=metric["task"],
        metric_type=metric["key"].removeprefix(f"{metric['task']}_"),
        metric_name=metric["title"],
        metric_value=round(value, 6),
        metric_args={"method": metric["method"]},
    )


# ---- names ----


def _full_hub_id(name: str | None) -> str | None:
    """`gpt2` is openai-community/gpt2."""
    return f"openai-community/{name}" if name and "/" not in name else name


def _table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
