"""The recipe: every setting of a run, with its default, its unit and its bounds; and what follows from them."""

import copy
import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


Auto = Literal["auto"]
Sampling = Literal["shuffle", "sequential", "random"]

BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def define_option(
    group: str, default: Any, help: str, *, changeable: bool = False, overridable: bool = False, **bounds: float
) -> Any:
    """A dataclass field that is a recipe option.

    Args:
        group: the heading under which `--help` lists the field.
        default: the field's default; each recipe gets its own copy of a list or dict.
        help: what the value means, with its unit.
        changeable: a resumed run may use another value, because it does not affect what the model learns.
        overridable: a resumed run may use another value with --override_recipe: it affects the steps to come only.
        bounds: `at_least=`, `above=`, `at_most=` or `below=`. None and `auto` satisfy them all.
    """
    metadata = {"group": group, "help": help, "changeable": changeable, "overridable": overridable, "bounds": bounds}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def options_of(group: str) -> Callable[..., Any]:
    """`define_option` for one group: the fields that it defines belong to that group."""
    return functools.partial(define_option, group)


@dataclass(frozen=True)
class Recipe:
    """One run. The defaults are build-nanogpt's for GPT-2 124M on FineWeb-Edu (train_gpt2.py).

    Each `option = options_of(...)` opens a group of `--help`; the fields below it belong to that group.
    """

    option = options_of("run")
    output_dir: str = option("runs/gpt2-124m", "directory of the run", changeable=True)
    seed: int = option(1337, "seed for initialization, data order and dropout", at_least=0, below=2**32)
    resume: bool = option(True, "resume from the newest checkpoint in output_dir", changeable=True)
    extend: bool = option(
        False, "resume with a larger max_steps although past steps would have had other learning rates", changeable=True
    )
    override_recipe: bool = option(
        False, "resume with other learning rates, decay rates or limits from now on; recorded", changeable=True
    )
    eval_only: bool = option(False, "print the losses of init_from on the data, without training", changeable=True)

    option = options_of("data")
    data_dir: str = option(
        "data/fineweb-edu",
        "directory written by prepare_data.py, or token files from nanoGPT, build-nanogpt, llm.c or datatrove",
        changeable=True,
    )
    data: dict[str, float] = option(
        {}, "weighted mixture of such directories, instead of data_dir, e.g. --data DIR=0.7 DIR=0.3", changeable=True
    )
    corpus: str = option("fineweb-edu", "corpus from which prepare_data.py builds data_dir", changeable=True)
    verify_data: bool = option(
        False, "hash all shards at this start, not only those that seem to have changed", changeable=True
    )
    sampling: Sampling = option("shuffle", "order of the training windows: shuffle, sequential or random")

    option = options_of("model")
    init_from: str = option(
        "scratch", "scratch; gpt2 ... gpt2-xl; a run, model folder or Hub id of a GPT-2; or a nanoGPT or llm.c file"
    )
    lora_rank: int = option(0, "train a LoRA adapter of this rank, not init_from's own weights; 0: off", at_least=0)
    model: dict[str, Any] = option({}, "fields of GPT2ReproConfig, e.g. n_layer; as flags: --model.n_layer 6")

    option = options_of("batch and run length")
    max_steps: int = option(19_073, "optimizer steps", overridable=True, at_least=1)
    global_batch_tokens: int = option(
        524_288, "tokens per optimizer step, over all ranks and micro-batches", at_least=1, at_most=2**40
    )
    batch_ramp_start: int = option(0, "tokens in the first step of a batch-size ramp; 0: no ramp", at_least=0)
    batch_ramp_tokens: int = option(0, "tokens over which the batch ramps up linearly", at_least=0, at_most=2**40)
    micro_batch_size: int | Auto = option(
        64,
        "sequences per rank and forward pass; auto: the most that fit, tried at the start",
        changeable=True,
        at_least=1,
    )
    sequence_length: int = option(
        1024, "tokens per sequence (T); positions of init_from beyond it are cropped", at_least=1
    )

    option = options_of("optimizer")
    optimizer: str = option(
        "adamw", "adamw, muon (for the blocks' matrices), or another in train/optimizers.py's registry"
    )
    weight_decay: float = option(
        0.1, "decoupled weight decay of tensors with 2 or more dimensions", overridable=True, at_least=0
    )
    adam_beta1: float = option(0.9, "AdamW's first-moment decay rate", overridable=True, at_least=0, below=1)
    adam_beta2: float = option(0.95, "AdamW's second-moment decay rate", overridable=True, at_least=0, below=1)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon", overridable=True, above=0)
    muon_learning_rate: float = option(
        0.02, "Muon's peak learning rate; scheduled like learning_rate", overridable=True, at_least=0
    )
    muon_momentum: float = option(0.95, "Muon's momentum", overridable=True, at_least=0, below=1)
    muon_weight_decay: float = option(0.05, "Muon's decoupled weight decay", overridable=True, at_least=0)
    max_grad_norm: float = option(
        1.0, "global gradient norm above which gradients are clipped", overridable=True, above=0
    )

    option = options_of("learning-rate schedule")
    learning_rate: float = option(6e-4, "AdamW's peak learning rate", overridable=True, at_least=0)
    min_learning_rate: float = option(6e-5, "learning rate at the end of the decay", overridable=True, at_least=0)
    warmup_steps: int = option(715, "steps of linear warm-up", overridable=True, at_least=0)
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = option(
        "cosine",
        "after the warm-up: cosine or linear decay, constant, or wsd (warm-up, stable, decay)",
        overridable=True,
    )
    decay_fraction: float = option(
        0.2, "final fraction of max_steps over which wsd decays", overridable=True, above=0, at_most=1
    )
    decay_shape: Literal["linear", "1-sqrt"] = option(
        "1-sqrt", "shape of wsd's decay: linear or 1-sqrt", overridable=True
    )

    option = options_of("evaluation")
    validate_every: int = option(
        250, "steps between validations; 0: only after the last step", changeable=True, at_least=0
    )
    validation_tokens: int = option(
        0, "tokens per validation, from the start of the split; 0: the whole split", changeable=True, at_least=0
    )
    reference_curve: str | None = option(
        None, "known run that each validation is compared with, e.g. llmc-124m-fineweb", changeable=True
    )
    hellaswag_every: int = option(0, "steps between HellaSwag evaluations; 0: never", changeable=True, at_least=0)
    hellaswag_data: str | None = option(
        None, "local HellaSwag file, .jsonl or .jsonl.gz; none: from the Hub", changeable=True
    )
    sample_every: int = option(250, "steps between samples; 0: only after the last step", changeable=True, at_least=0)
    sample_prompts: list[str] = option(["Hello, I'm a language model,"], "prompts to sample from", changeable=True)
    sample_tokens: int = option(64, "new tokens per sample", changeable=True, at_least=1)
    sample_temperature: float = option(1.0, "sampling temperature", changeable=True, above=0)

    option = options_of("checkpoints and early stopping")
    checkpoint_every: int = option(
        1000, "steps between checkpoints; the last step always has one", changeable=True, at_least=1
    )
    keep_last: int = option(
        2, "newest checkpoints to keep, besides the best of those whose step was validated", changeable=True, at_least=1
    )
    keep_every: int = option(
        0, "also keep checkpoints whose step is a multiple of this; 0: none", changeable=True, at_least=0
    )
    max_hours: float = option(
        0.0, "hours after which the run saves and exits with code 75; 0: no limit", changeable=True, at_least=0
    )
    patience: int = option(
        0, "stop after this many validations without improvement, and export the best model; 0: never", at_least=0
    )

    option = options_of("bad steps")
    max_bad_steps: int = option(
        8, "consecutive bad steps that trigger a rollback to a checkpoint", changeable=True, at_least=1
    )
    max_rollbacks: int = option(3, "rollbacks before the run fails", changeable=True, at_least=0)
    spike_zscore: float = option(
        6.0, "standard deviations above recent losses that make a loss a spike", overridable=True, above=0
    )
    skip_spikes: bool = option(False, "skip the update when the loss spikes", overridable=True)

    option = options_of("speed and memory")
    compile: bool = option(False, "torch.compile the model; its dropout drops other units", overridable=True)
    attention: Literal["auto", "sdpa", "cudnn", "flash", "eager"] = option(
        "auto",
        "attention kernel in training: torch's cudnn or flash (no package), sdpa (torch's choice), eager (plain); "
        "auto: cudnn on Hopper if it runs there, else sdpa",
        changeable=True,
    )
    gradient_checkpointing: bool = option(False, "recompute activations instead of storing them", changeable=True)
    num_workers: int = option(1, "processes that prefetch batches; 0: none", changeable=True, at_least=0)

    option = options_of("logging and tracking")
    log_every: int = option(1, "steps between rows of metrics.jsonl", changeable=True, at_least=1)
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = option(
        "none", "experiment tracker: tensorboard, wandb or trackio", changeable=True
    )
    peak_tflops: float | None = option(
        None, "peak TFLOPS of one device, for MFU; none: looked up by device name", changeable=True, above=0
    )
    dollars_per_hour: float | None = option(
        None, "price of all machines together, for the cost of the run", changeable=True, above=0
    )
    reference_losses: dict[str, float] = option({}, "name: loss, drawn as lines in loss.png", changeable=True)

    option = options_of("publishing")
    push_to_hub: bool = option(False, "upload the model folder at the end of the run", changeable=True)
    hub_model_id: str = option("", "Hub repository to push to, owner/name", changeable=True)
    license: str | None = option(None, "license of the weights, for the model card, e.g. apache-2.0", changeable=True)

    del option

    @property
    def sources(self) -> dict[str, float]:
        """The directories that the run reads, with their weights."""
        return self.data or {self.data_dir: 1.0}

    @property
    def sequences_per_micro_batch(self) -> int:
        """micro_batch_size as the number that train/micro_batch.py puts in place of `auto`."""
        assert self.micro_batch_size != "auto", "still to be chosen"
        return self.micro_batch_size

    @property
    def wsd_decay_start(self) -> float:
        """The step at which the decay of lr_schedule=wsd begins; the learning rate of earlier steps does not depend on
        max_steps."""
        return self.max_steps * (1 - self.decay_fraction)

    def tokens_before(self, step: int) -> int:
        """Tokens in the batches of all steps before `step`."""
        ramp = ramp_tokens_before(self.batch_ramp_start, self.global_batch_tokens, self.batch_ramp_tokens)
        ramp_steps = len(ramp) - 1
        if step < ramp_steps:
            return ramp[step]
        return ramp[ramp_steps] + (step - ramp_steps) * self.global_batch_tokens

    def first_sample(self, batch: int) -> int:
        """Number of a batch's first training sample, i.e. how many sequences the earlier batches have."""
        return self.tokens_before(batch) // self.sequence_length

    def accumulation(self, num_processes: int, batch: int) -> int:
        """Gradient accumulation: micro-batches per rank in a batch."""
        tokens = self.tokens_before(batch + 1) - self.tokens_before(batch)
        return tokens // (self.sequences_per_micro_batch * self.sequence_length * num_processes)

    def problems(self, num_processes: int) -> list[str]:
        """Everything wrong with the values: one line each, with the value, the rule and the remedy."""
        problems = self.bound_problems()
        if not problems:  # the batch arithmetic divides by sizes that must be positive
            problems += self._batch_problems(num_processes)
        problems += self.schedule_problems()
        problems += self._lora_problems()
        problems += self._evaluation_problems()
        problems += self._publishing_problems()
        return problems

    def bound_problems(self) -> list[str]:
        """One line for each value outside its bounds; with one, nothing may be computed from the others."""
        problems = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            bounds = field.metadata["bounds"]
            if value in (None, "auto") or all(BOUNDS[name](value, limit) for name, limit in bounds.items()):
                continue
            rule = " and ".join(f"{name.replace('_', ' ')} {limit}" for name, limit in bounds.items())
            problems.append(f"{field.name}={value} must be {rule}")
        return problems

    def _batch_problems(self, num_processes: int) -> list[str]:
        size = 1 if self.micro_batch_size == "auto" else self.micro_batch_size  # at least one sequence
        unit = size * self.sequence_length * num_processes
        if self.global_batch_tokens % unit == 0:
            return self._ramp_problems(unit)
        below = self.global_batch_tokens // unit * unit
        multiples = f"{below} or {below + unit}" if below else f"{unit}"
        remedy = f"use global_batch_tokens={multiples}"
        sequences, remainder = divmod(self.global_batch_tokens, self.sequence_length * num_processes)
        if remainder == 0:
            nearest = min(divisors(sequences), key=lambda divisor: abs(divisor - size))
            remedy += f", or micro_batch_size={nearest}"
        return [
            f"global_batch_tokens={self.global_batch_tokens} is not a multiple of {size} x "
            f"{self.sequence_length} x {num_processes} = {unit} (micro_batch_size x sequence_length x processes); "
            f"{remedy}"
        ]

    def _ramp_problems(self, unit: int) -> list[str]:
        has_start, has_tokens = self.batch_ramp_start > 0, self.batch_ramp_tokens > 0
        if has_start != has_tokens:
            return [
                f"batch_ramp_start={self.batch_ramp_start} and batch_ramp_tokens={self.batch_ramp_tokens}: a ramp "
                "needs both; set both, or neither"
            ]
        starts = [unit * size for size in divisors(self.global_batch_tokens // unit)]
        if not has_start or self.batch_ramp_start in starts:
            return []
        nearest = sorted(starts, key=lambda start: abs(start - self.batch_ramp_start))[:2]
        return [
            f"batch_ramp_start={self.batch_ramp_start} must divide global_batch_tokens={self.global_batch_tokens} and "
            f"be a multiple of {unit} (micro_batch_size x sequence_length x processes); use "
            + " or ".join(map(str, sorted(nearest)))
        ]

    def schedule_problems(self) -> list[str]:
        """What is wrong with the learning rates and their steps."""
        problems = []
        if self.lr_schedule != "constant" and self.min_learning_rate > self.learning_rate:
            problems.append(
                f"min_learning_rate={self.min_learning_rate} must be at most learning_rate={self.learning_rate}; "
                "change one of them"
            )
        if self.optimizer == "muon" and self.learning_rate == 0:
            problems.append("learning_rate=0 must be above 0 with muon, whose learning rate is a multiple of it")
        decay_start = self.wsd_decay_start
        if self.warmup_steps >= self.max_steps:
            problems.append(
                f"warmup_steps={self.warmup_steps} must be below max_steps={self.max_steps}; change one of them"
            )
        elif self.lr_schedule == "wsd" and self.warmup_steps > decay_start:
            problems.append(
                f"warmup_steps={self.warmup_steps} must be at most {decay_start:g}, where the decay begins (max_steps="
                f"{self.max_steps} x (1 - decay_fraction={self.decay_fraction})); lower warmup_steps or decay_fraction"
            )
        return problems

    def _lora_problems(self) -> list[str]:
        problems = []
        if self.lora_rank and self.init_from == "scratch":
            problems.append(
                f"lora_rank={self.lora_rank} adapts a trained model, but init_from=scratch has random weights; set "
                "--init_from to a run or a model, or drop lora_rank"
            )
        if self.lora_rank and self.optimizer == "muon":
            problems.append(
                f"optimizer=muon makes the updates of whole matrices orthogonal, but lora_rank={self.lora_rank} trains "
                "two factors of each; use adamw"
            )
        return problems

    def _evaluation_problems(self) -> list[str]:
        problems = []
        if self.eval_only and self.init_from == "scratch":
            problems.append("init_from=scratch is untrained; with eval_only, set --init_from to a run or a model")
        if self.patience and not self.validate_every:
            problems.append(
                f"patience={self.patience} counts validations, but validate_every=0 runs none; change one of them"
            )
        if self.hellaswag_data is not None and not Path(self.hellaswag_data).is_file():
            problems.append(f"hellaswag_data={self.hellaswag_data} must be a HellaSwag file, .jsonl or .jsonl.gz")
        return problems

    def _publishing_problems(self) -> list[str]:
        if self.push_to_hub and self.hub_model_id.count("/") != 1:
            return ["push_to_hub needs a repository; add --hub_model_id owner/name"]
        return []


@functools.cache
def ramp_tokens_before(start: int, full: int, length: int) -> tuple[int, ...]:
    """Tokens before each step of a batch-size ramp, and before the first step after it; (0,) without a ramp.

    The batch grows linearly with the tokens seen, in multiples of `start`, and is full once `length` tokens were seen.

    Args:
        start: tokens in the first step.
        full: tokens per step after the ramp, a multiple of `start`.
        length: tokens over which the batch grows; 0: no ramp.
    Source: GPT-3 paper, section 2.3 and appendix B; Megatron-LM's rampup_batch_size.
    """
    tokens_before = [0]
    while tokens_before[-1] < length:
        seen = tokens_before[-1]
        batch_tokens = start * (1 + seen * (full // start - 1) // length)
        tokens_before.append(seen + batch_tokens)
    return tuple(tokens_before)


def divisors(number: int) -> list[int]:
    """In ascending order."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})
