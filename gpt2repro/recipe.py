"""The recipe: everything that defines a run. Defaults, then the YAML file, then the flags; all mistakes at once."""

import argparse
import copy
import dataclasses
import difflib
import functools
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal

import yaml

from gpt2repro.errors import Parser, UserError


Sampling = Literal["shuffle", "sequential", "random"]


def option(default: Any, help: str, *, changeable: bool = False) -> Any:
    """A recipe field. A changeable one may differ when a run is resumed: it does not alter what is learnt."""
    metadata = {"help": help, "changeable": changeable}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Recipe:
    """One run. The defaults are build-nanogpt's for GPT-2 124M on FineWeb-Edu (train_gpt2.py)."""

    data_dir: str = option(
        "data/fineweb-edu",
        "directory that prepare_data.py made, or tokens of nanoGPT, build-nanogpt, llm.c or datatrove",
        changeable=True,
    )
    data: dict = option(
        {}, "several such directories with weights, instead of data_dir; flag: --data DIR=0.7 DIR=0.3", changeable=True
    )
    corpus: str = option("fineweb-edu", "what prepare_data.py makes data_dir from", changeable=True)
    output_dir: str = option("runs/gpt2-124m", "directory of the run", changeable=True)
    init_from: str = option(
        "scratch", "scratch; gpt2 ... gpt2-xl; any run, model folder or Hub id of a GPT-2; a nanoGPT or llm.c file"
    )
    seed: int = option(1337, "seed of initialisation, data order and dropout")

    max_steps: int = option(19_073, "optimizer steps")
    global_batch_tokens: int = option(524_288, "tokens a step, over all processes and micro-batches")
    batch_ramp_start: int = option(0, "tokens of the first step, where the batch grows; 0: it has its size at once")
    batch_ramp_tokens: int = option(0, "tokens in which the batch grows from its start, by as much at a time")
    micro_batch_size: int = option(64, "sequences a process sends through the model at once", changeable=True)
    sequence_length: int = option(1024, "tokens a sequence (T); what init_from has beyond is cut off")
    sampling: Sampling = option("shuffle", "order of the training windows: see gpt2repro/data/order.py")

    optimizer: Literal["adamw", "muon"] = option("adamw", "for all weights; muon: for the blocks' matrices only")
    learning_rate: float = option(6e-4, "peak learning rate of AdamW")
    min_learning_rate: float = option(6e-5, "learning rate at the end of the decay")
    warmup_steps: int = option(715, "steps of linear warm-up")
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = option(
        "cosine", "after the warm-up: decay to the minimum as a cosine or a line, no decay, or one at the end"
    )
    decay_fraction: float = option(0.2, "part of max_steps, the last, in which wsd decays")
    decay_shape: Literal["linear", "1-sqrt"] = option("1-sqrt", "the decay of wsd")
    weight_decay: float = option(0.1, "decoupled decay of tensors with 2 or more dimensions")
    adam_beta1: float = option(0.9, "AdamW's first moment decay")
    adam_beta2: float = option(0.95, "AdamW's second moment decay")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon")
    muon_learning_rate: float = option(0.02, "Muon's peak learning rate; it follows the schedule of learning_rate")
    muon_momentum: float = option(0.95, "Muon's momentum")
    muon_weight_decay: float = option(0.05, "Muon's decoupled decay")
    max_grad_norm: float = option(1.0, "global gradient norm above which gradients are scaled down")

    log_every: int = option(1, "steps between rows of metrics.jsonl", changeable=True)
    validate_every: int = option(250, "steps between validations; 0: only at the end", changeable=True)
    validation_tokens: int = option(
        0, "tokens of each validation, from the start of the split; 0: all", changeable=True
    )
    hellaswag_every: int = option(0, "steps between HellaSwag evaluations; 0: never", changeable=True)
    hellaswag_data: str | None = option(None, "local HellaSwag jsonl(.gz); none: from the Hub", changeable=True)
    sample_every: int = option(250, "steps between samples; 0: only at the end", changeable=True)
    sample_prompts: list[str] = option(["Hello, I'm a language model,"], "prompts of the samples", changeable=True)
    sample_tokens: int = option(64, "new tokens of each sample", changeable=True)
    sample_temperature: float = option(1.0, "divides the logits of the samples; lower is more careful", changeable=True)
    checkpoint_every: int = option(1000, "steps between checkpoints; there is one at the end too", changeable=True)
    keep_last: int = option(2, "how many checkpoints are kept, besides the one of the best validation", changeable=True)
    keep_every: int = option(0, "keep each checkpoint whose step is a multiple of this too; 0: none", changeable=True)
    max_hours: float = option(0.0, "save and end after so many hours, with exit code 75; 0: no limit", changeable=True)
    patience: int = option(0, "end after so many validations without a better one, with the best; 0: never")

    max_bad_steps: int = option(8, "bad steps in a row after which the run goes back to a checkpoint", changeable=True)
    max_rollbacks: int = option(3, "how often it goes back before it ends", changeable=True)
    spike_zscore: float = option(6.0, "a loss so many standard deviations above the last ones is a spike")
    skip_spikes: bool = option(False, "make no update from a spike")

    eval_only: bool = option(False, "print the losses of init_from on the data, and train nothing", changeable=True)
    gradient_checkpointing: bool = option(False, "compute activations twice instead of keeping them", changeable=True)
    compile: bool = option(False, "torch.compile the model", changeable=True)
    num_workers: int = option(1, "processes that read batches ahead; 0: none", changeable=True)
    resume: bool = option(True, "go on from the newest checkpoint in output_dir", changeable=True)
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = option("none", "tracker", changeable=True)
    peak_tflops: float | None = option(None, "of one device, for MFU; none: by its name", changeable=True)
    dollars_per_hour: float | None = option(None, "of the whole machine, for the cost of the run", changeable=True)
    push_to_hub: bool = option(False, "upload the model folder at the end", changeable=True)
    license: str | None = option(None, "of the weights, for the model card, e.g. apache-2.0", changeable=True)
    hub_model_id: str = option("", "Hub repository to push to, owner/name", changeable=True)

    model: dict = option({}, "fields of GPT2ReproConfig, e.g. n_layer; flags: --model.n_layer 6")
    reference_losses: dict = option({}, "name: loss, drawn as lines in loss.png", changeable=True)

    @property
    def sources(self) -> dict[str, float]:
        """The directories that the run reads, with their weights."""
        return self.data or {self.data_dir: 1.0}

    def tokens_before(self, step: int) -> int:
        """Tokens of the batches of all steps before `step`."""
        ramp: tuple[int, ...] = (0,)
        if self.batch_ramp_start:
            ramp = _ramp(self.batch_ramp_start, self.global_batch_tokens, self.batch_ramp_tokens)
        past = step - (len(ramp) - 1)  # steps since the ramp
        return ramp[step] if past < 0 else ramp[-1] + past * self.global_batch_tokens

    def first_sample(self, step: int) -> int:
        """The number of a step's first training sample: how many sequences the batches before it have."""
        return self.tokens_before(step) // self.sequence_length

    def accumulation(self, num_processes: int, step: int) -> int:
        """Micro-batches of each process in a step."""
        tokens = self.tokens_before(step + 1) - self.tokens_before(step)
        return tokens // (self.micro_batch_size * self.sequence_length * num_processes)

    def problems(self, num_processes: int) -> list[str]:
        """What is wrong with the values: one line each, with the rule and the remedy."""
        found = [
            f"{name}={getattr(self, name)} must be {rule}"
            for names, rule, holds in _RULES
            for name in names.split()
            if not holds(getattr(self, name))
        ]
        if not found:
            found += self._batch_problems(num_processes)
        if self.lr_schedule != "constant" and self.min_learning_rate > self.learning_rate:
            found.append(f"min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}")
        if self.warmup_steps >= self.max_steps:
            found.append(
                f"warmup_steps={self.warmup_steps} must be below max_steps={self.max_steps}; change one of them"
            )
        elif self.lr_schedule == "wsd" and self.warmup_steps > (stable := self.max_steps * (1 - self.decay_fraction)):
            found.append(
                f"warmup_steps={self.warmup_steps} must be at most {stable:g}, where the decay begins (max_steps="
                f"{self.max_steps} x (1 - decay_fraction={self.decay_fraction})); lower warmup_steps or decay_fraction"
            )
        if self.optimizer == "muon" and self.learning_rate == 0:
            found.append("learning_rate=0 must be above 0 with muon, whose learning rate is in proportion to it")
        if self.eval_only and self.init_from == "scratch":
            found.append("init_from=scratch has learnt nothing; with eval_only add --init_from with a run or a model")
        if self.patience and not self.validate_every:
            found.append(
                f"patience={self.patience} counts validations, and validate_every=0 has none; change one of them"
            )
        if self.push_to_hub and self.hub_model_id.count("/") != 1:
            found.append("push_to_hub needs a repository: add --hub_model_id owner/name")
        return found

    def _batch_problems(self, num_processes: int) -> list[str]:
        unit = self.micro_batch_size * self.sequence_length * num_processes
        if self.global_batch_tokens % unit == 0:
            return self._ramp_problems(unit)
        below = self.global_batch_tokens // unit * unit
        remedy = "use global_batch_tokens=" + (f"{below} or {below + unit}" if below else f"{unit}")
        sequences, rest = divmod(self.global_batch_tokens, self.sequence_length * num_processes)
        if not rest:
            divisors = [size for size in range(1, sequences + 1) if sequences % size == 0]
            remedy += f", or micro_batch_size={min(divisors, key=lambda size: abs(size - self.micro_batch_size))}"
        return [
            f"global_batch_tokens={self.global_batch_tokens} is not a multiple of {self.micro_batch_size} x "
            f"{self.sequence_length} x {num_processes} = {unit} (micro_batch_size x sequence_length x processes); "
            + remedy
        ]

    def _ramp_problems(self, unit: int) -> list[str]:
        if (self.batch_ramp_start > 0) != (self.batch_ramp_tokens > 0):
            return [
                f"batch_ramp_start={self.batch_ramp_start} and batch_ramp_tokens={self.batch_ramp_tokens}: a ramp has "
                "both; give both, or neither"
            ]
        units = self.global_batch_tokens // unit
        starts = [unit * size for size in range(1, units + 1) if units % size == 0]
        if not self.batch_ramp_start or self.batch_ramp_start in starts:
            return []
        nearest = sorted(starts, key=lambda start: abs(start - self.batch_ramp_start))[:2]
        return [
            f"batch_ramp_start={self.batch_ramp_start} must divide global_batch_tokens={self.global_batch_tokens} and "
            f"be a multiple of {unit} (micro_batch_size x sequence_length x processes); use "
            + " or ".join(map(str, sorted(nearest)))
        ]


@functools.cache
def _ramp(start: int, full: int, length: int) -> tuple[int, ...]:
    """Tokens before each step of a batch-size ramp, and before the first step after it.

    The batch grows linearly with the tokens seen, in multiples of `start`, and is full once `length` tokens were seen.
    Source: GPT-3 paper, section 2.3 and appendix B; Megatron-LM's rampup_batch_size.
    """
    before = [0]
    while (seen := before[-1]) < length:
        before.append(seen + start * (1 + seen * (full // start - 1) // length))
    return tuple(before)


_RULES = (  # fields, what their value must be, the test of it
    (
        "max_steps global_batch_tokens micro_batch_size sequence_length log_every checkpoint_every keep_last "
        "sample_tokens max_bad_steps",
        "at least 1",
        lambda value: value >= 1,
    ),
    (
        "learning_rate min_learning_rate warmup_steps weight_decay muon_learning_rate muon_weight_decay "
        "batch_ramp_start batch_ramp_tokens validate_every validation_tokens hellaswag_every sample_every num_workers "
        "keep_every max_hours patience max_rollbacks",
        "at least 0",
        lambda value: value >= 0,
    ),
    ("adam_epsilon max_grad_norm sample_temperature spike_zscore", "above 0", lambda value: value > 0),
    ("peak_tflops dollars_per_hour", "above 0", lambda value: value is None or value > 0),
    ("seed", "at least 0 and below 2**32", lambda value: 0 <= value < 2**32),
    ("decay_fraction", "above 0 and at most 1", lambda value: 0 < value <= 1),
    ("adam_beta1 adam_beta2 muon_momentum", "at least 0 and below 1", lambda value: 0 <= value < 1),
    (
        "hellaswag_data",
        "a HellaSwag file, .jsonl or .jsonl.gz",
        lambda value: value is None or Path(value).is_file(),
    ),
)


def parse_recipe(argv: list[str], default_config: Path, config_class: type) -> tuple[Recipe, list[str]]:
    """The recipe of a command line, and what is wrong with the fields' names and types.

    Args:
        argv: `--config FILE`, and `--field value` or `--model.field value` that override it.
        default_config: the recipe where no --config is given.
        config_class: the model's configuration class; its annotated fields are what `model` may hold.
    Returns:
        The recipe, with defaults where a value was wrong; and a line for each mistake: an unknown field with the
        nearest name, a value of the wrong type.
    Raises:
        UserError: the recipe file cannot be read.
    """
    hints = typing.get_type_hints(Recipe)
    hints |= {f"model.{name}": hint for name, hint in config_class.__annotations__.items()}
    flags, unknown = _parser(hints).parse_known_args(argv)
    values = _read_yaml(Path(flags.config or default_config))
    problems = [_unknown(word, [f"--{name}" for name in hints]) for word in unknown if word.startswith("-")]
    problems += [
        f"unexpected argument {word!r}; flags are --field value"
        for before, word in zip(["", *unknown], unknown)
        if not word.startswith("-") and not before.startswith("-")  # else it is the unknown field's value
    ]

    model = values.pop("model", None) or {}
    if isinstance(model, dict):
        values |= {f"model.{name}": value for name, value in model.items()}
    else:
        problems.append(f"model={model!r} is not a table of the model's fields")
    given = {name: value for name, value in vars(flags).items() if name != "config" and value is not None}
    if any(layer.get("data") and "data_dir" in layer for layer in (values, given)):
        problems.append("data and data_dir are both given; data has all directories, leave data_dir out")
    if "data_dir" in given:
        values.pop("data", None)  # the flags choose anew
    values |= given

    fields: dict = {"model": {}}
    for name, value in values.items():
        name = str(name)
        if name not in hints:
            problems.append(_unknown(name, list(hints)))
            continue
        try:
            value = _coerce(value, hints[name])
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            problems.append(f"{name}={value!r} is not {_describe(hints[name])}")
            continue
        if name.startswith("model."):
            fields["model"][name.removeprefix("model.")] = value
        else:
            fields[name] = value
    if fields.get("data"):
        fields["data_dir"] = ""  # which such a run does not read
    return Recipe(**fields), problems


def differences(recipe: Recipe, other: dict) -> list[str]:
    """The fields in which another run's recipe, given as a dict, trains another model."""
    return [
        f"{f.name}={other.get(f.name, _default(f))} there, {getattr(recipe, f.name)} here"
        for f in dataclasses.fields(Recipe)
        if not f.metadata["changeable"] and other.get(f.name, _default(f)) != getattr(recipe, f.name)
    ]


def _parser(hints: dict) -> argparse.ArgumentParser:
    """A flag for each field, all as text: their values are read as those of the YAML file are."""
    parser = Parser("Train GPT-2. Flags override the recipe; so do --model.FIELD flags.")
    parser.add_argument("--config", help="recipe file, one of recipes/ or your own")
    described = {f.name: f"{f.metadata['help']} (default: {_default(f)})" for f in dataclasses.fields(Recipe)}
    for name, hint in hints.items():
        if hint is not dict:
            bare: dict[str, Any] = {"nargs": "?", "const": "true"} if hint is bool else {}
            help = described.get(name, argparse.SUPPRESS).replace("%", "%%")
            parser.add_argument(f"--{name}", metavar="VALUE", help=help, **bare)
    parser.add_argument("--data", nargs="+", metavar="DIR=WEIGHT", help=described["data"])
    return parser


def _default(f: dataclasses.Field) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _read_yaml(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(
            f"--config {path} cannot be read ({error.strerror}); recipes/ holds the known recipes"
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must be a table of `field: value` lines")
    return content


def _unknown(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"unknown recipe field {name}; " + (f"did you mean {nearest[0]}?" if nearest else "see --help")


def _coerce(value: Any, hint: Any) -> Any:
    """The value as the field's type; flags are always text, and YAML 1.1 reads even 6e-4 as text.

    Raises:
        AttributeError, KeyError, TypeError, ValueError or OverflowError: the value is not of that type.
    """
    if isinstance(hint, UnionType):
        if str(value).lower() in ("none", "null") and NoneType in typing.get_args(hint):
            return None
        return _coerce(value, typing.get_args(hint)[0])
    if typing.get_origin(hint) is list:
        return [_coerce(item, typing.get_args(hint)[0]) for item in (value if isinstance(value, list) else [value])]
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(value)
        return value
    if hint is dict:
        if isinstance(value, list):  # words of a flag, name=number
            words = [word.rsplit("=", 1) for word in value]
            value = dict(words)
            if len(value) < len(words):
                raise ValueError(words)
        return {str(name): float(number) for name, number in value.items()}
    if hint is bool:
        return {"true": True, "false": False}[str(value).lower()]
    if value is None or isinstance(value, bool | dict | list):
        raise TypeError(value)
    if hint is str:
        return str(value)
    number = float(value)
    if not math.isfinite(number) or (hint is int and not number.is_integer()):
        raise ValueError(value)
    return hint(number)


def _describe(hint: Any) -> str:
    if isinstance(hint, UnionType):
        return " or ".join(_describe(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"a list of {_describe(typing.get_args(hint)[0])}"
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", NoneType: "none"}
    return names.get(hint, "a table of name: number")
