"""How good is a model, and is it better than another? One table beside OpenAI's GPT-2, with 95% intervals.

    python scorecard.py runs/mine --data data/fineweb-edu                        # beside published figures of GPT-2
    python scorecard.py runs/mine runs/other --output card                       # which of the two, and is it chance?
    python scorecard.py runs/mine --against gpt2 gpt2-medium                     # measured here, if they can be had
    python scorecard.py runs/mine --tasks hellaswag wikitext2 --task_data hellaswag=val.jsonl.gz wikitext2=wiki.test
    python scorecard.py --weights-only gpt2 ./exported-gpt2                      # is a conversion exact?

MODEL is a run, a checkpoint, a folder as written by save_pretrained, a Hub id, or a file of nanoGPT, build-nanogpt or
llm.c. Without --tasks: hellaswag, lambada, wikitext2 and ptb, those that can be had; --data adds the loss on the
validation split of a prepared directory, --text the perplexity of text files. What was measured once is not measured
again, unless the model, the data or the method has changed. docs/evaluation.md says how each number is made.

--weights-only compares two models with the same tokenizer on one text in float32: how far the hidden states of each
layer and the logits differ, both losses, how often both predict the same token, and the KL divergence.
"""

import argparse
import difflib
from pathlib import Path

from gpt2repro.errors import Parser, UserError, check_before_imports, problems_of, refuse, run_script
from gpt2repro.evaluation.detokenizers import DETOKENIZERS
from gpt2repro.files import write_problem
from gpt2repro.models.find import DTYPES, find_model
from gpt2repro.prepare.built_in import python_docs


CHARACTERS_PER_TOKEN = 8  # more than tokens of the default text have
TASKS = ("validation", "hellaswag", "lambada", "wikitext2", "wikitext103", "ptb")
# Not wikitext103: without <unk> its test set is wikitext2's.
DEFAULT_TASKS = ("hellaswag", "lambada", "wikitext2", "ptb")
CARD_FILES = ("scorecard.json", "scorecard.md", "scorecard.png")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="the models to measure")
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="NAME",
        help="models to compare with, measured in the same way; of gpt2, gpt2-medium, gpt2-large and gpt2-xl published "
        "figures if the weights cannot be had (default: published figures of gpt2, nothing is downloaded)",
    )
    parser.add_argument("--data", metavar="DIR", help="prepared directory: the loss on its validation split")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help=f"of {', '.join(TASKS)}")
    parser.add_argument(
        "--task_data", nargs="+", default=[], metavar="NAME=FILE", help="local data of tasks (default: from the Hub)"
    )
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="text files: their perplexity")
    parser.add_argument(
        "--limit", type=int, help="score only LIMIT items or documents of each benchmark, spread over it"
    )
    parser.add_argument(
        "--validation_tokens",
        type=int,
        default=10_485_760,
        help="of --data, from the start of its validation split; 0: all (default: %(default)s)",
    )
    parser.add_argument(
        "--stride", type=int, help="tokens that each window of a text predicts (default: as many as the model takes)"
    )
    parser.add_argument(
        "--detokenize", choices=DETOKENIZERS, help="rules for all texts (default: those of each benchmark)"
    )
    parser.add_argument(
        "--batch_size", type=int, help="items or windows per forward pass (default: by the memory that logits take)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype of the weights; auto: as saved")
    parser.add_argument(
        "--output", type=Path, help=f"folder for {', '.join(CARD_FILES)}; with --weights-only: a new JSON file"
    )
    parser.add_argument("--weights-only", nargs=2, metavar=("A", "B"), help="compare two models on one text instead")
    parser.add_argument("--tokens", type=int, default=8192, help="of text, for --weights-only (default: %(default)s)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the model code that comes with a MODEL")
    args = parser.parse_args(argv)
    args.output = args.output and args.output.expanduser()
    args.data = args.data and str(Path(args.data).expanduser())
    args.text = [str(Path(file).expanduser()) for file in args.text]
    return args


def check_command_line(argv: list[str]) -> None:
    """Raise one UserError with every mistake that can be told without opening models and data."""
    args = parse_arguments(argv)
    if args.weights_only:
        check_comparison(args)
    else:
        refuse(check_card(args) + [problem for model in args.models for problem in problems_of(find_model, model)])


def check_card(args: argparse.Namespace) -> list[str]:
    """The mistakes in the flags of a scorecard. The files of --task_data become args.task_files."""
    problems = []
    if not args.models:
        problems.append("no MODEL given; `python scorecard.py runs/mine` measures one")
    for name, least in (("limit", 1), ("stride", 1), ("batch_size", 1), ("validation_tokens", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            problems.append(f"--{name} {value} must be at least {least}")
    problems += [problem for name in args.tasks or [] for problem in task_problems(name, "--tasks")]
    if "validation" in (args.tasks or []) and not args.data:
        problems.append("--tasks validation needs the prepared directory: give --data DIR")
    problems += task_data_problems(args)
    args.tasks = args.tasks and [name for name in TASKS if name in args.tasks]
    if args.output:
        existing = [name for name in CARD_FILES if (args.output / name).exists()]
        if existing:
            problems.append(
                f"--output {args.output}: {existing[0]} exists and is not overwritten; choose another folder"
            )
        elif not args.output.parent.is_dir():
            problems.append(f"--output {args.output}: no folder {args.output.parent}; create it first")
        elif unwritable := write_problem(args.output):
            problems.append(f"--output {args.output}: {unwritable}; choose another folder")
    return problems


def task_problems(name: str, flag: str) -> list[str]:
    if name in TASKS:
        return []
    nearest = difflib.get_close_matches(name, TASKS, n=1)
    remedy = f"did you mean {nearest[0]}?" if nearest else f"choose from {', '.join(TASKS)}"
    return [f"{flag} {name}: no such task; {remedy}"]


def task_data_problems(args: argparse.Namespace) -> list[str]:
    """Turn --task_data into args.task_files; one line for each entry that cannot be used."""
    problems = []
    files: dict[str, str] = {}
    for entry in args.task_data:
        name, separator, file = entry.partition("=")
        path = Path(file).expanduser()
        if not separator or not file:
            problems.append(f"--task_data {entry} must be NAME=FILE, as in hellaswag=hellaswag_val.jsonl")
        elif unknown := task_problems(name, "--task_data"):
            problems += unknown
        elif name == "validation":
            problems.append("--task_data validation: prepared data is given with --data DIR")
        elif name not in (DEFAULT_TASKS if args.tasks is None else args.tasks):
            problems.append(f"--task_data {entry}: {name} is not measured; add it to --tasks")
        elif not path.is_file():
            problems.append(f"--task_data {entry}: no such file; without it, {name} comes from the Hub")
        else:
            files[name] = str(path)
    args.task_files = files
    return problems


def names_of(entries: list[str]) -> set[str]:
    """The tasks in --task_data."""
    return {entry.partition("=")[0] for entry in entries}


def check_comparison(args: argparse.Namespace) -> None:
    """Raise one UserError with every mistake in the flags of --weights-only."""
    problems = []
    for model in args.weights_only:
        problems += problems_of(find_model, model)
    if args.models or args.against or args.tasks or args.data:
        problems.append("--weights-only A B measures no tasks; drop the other models, --against, --tasks and --data")
    if len(args.text) > 1:
        problems.append(f"--text: {len(args.text)} files given, --weights-only takes one")
    elif args.text:
        problems += problems_of(comparison_text, args.text, args.tokens)
    if args.tokens < 1:
        problems.append(f"--tokens {args.tokens} must be at least 1")
    if args.output and (args.output.exists() or not args.output.parent.is_dir()):
        problems.append(f"--output {args.output} must be a new file in an existing folder; choose another name")
    elif args.output and (unwritable := write_problem(args.output.parent)):
        problems.append(f"--output {args.output}: {unwritable}; choose another folder")
    refuse(problems)


def comparison_text(paths: list[str], tokens: int) -> str:
    """The given text, or enough of the documentation that ships with Python for so many tokens."""
    if not paths:
        return default_text(tokens * CHARACTERS_PER_TOKEN)
    [path] = paths
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path} cannot be read ({error}); give a text file in UTF-8") from error


def default_text(min_characters: int) -> str:
    texts = []
    length = 0
    for text in python_docs():
        texts.append(text)
        length += len(text)
        if length > min_characters:
            break
    return "\n".join(texts)


if __name__ == "__main__":
    check_before_imports(check_command_line)  # mistakes end here, before the seconds that the imports below take

import dataclasses
import functools
import json
import sys
from typing import Any

import torch
from accelerate import Accelerator

from gpt2repro.evaluation.compare import as_table as comparison_table
from gpt2repro.evaluation.compare import compare_models
from gpt2repro.evaluation.perplexity import WindowSettings
from gpt2repro.evaluation.published import OpenAIModel, openai_model, openai_models
from gpt2repro.evaluation.rows import UnsuitableTokenizer
from gpt2repro.evaluation.score_cache import cache_file, model_folder, model_sha256, read_cached, write_cached
from gpt2repro.evaluation.scorecard import MeasuredModel, make_scorecard, software_versions
from gpt2repro.evaluation.scorecard_views import as_markdown, as_table, draw_scorecard
from gpt2repro.evaluation.task import Columns, Task
from gpt2repro.evaluation.tasks import (
    PreparedData,
    benchmark_task,
    hellaswag_task,
    lambada_task,
    plain_text_task,
    validation_task,
    validation_text_task,
    vocabulary_sha256,
)
from gpt2repro.files import write_json, write_text
from gpt2repro.models.folder import load_tokenizer, open_model
from gpt2repro.models.packed_weights import pack_weights
from gpt2repro.processes import cpu_asked, device_name, note_missing_processes, on_main
from gpt2repro.run_folder import RunFolder


DEFAULT_SIZE = "gpt2"


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    if args.weights_only:
        check_comparison(args)
        compare(args)
        return
    notes: list[str] = []
    plan = make_plan(args, notes)
    note_missing_processes()
    accelerator = Accelerator(cpu=cpu_asked())
    measured = [measure(subject, plan, args, accelerator, notes) for subject in plan.subjects]
    setting = {
        "device": device_name(accelerator.device),
        "dtype": args.dtype,
        "mixed_precision": accelerator.mixed_precision,
    }
    if accelerator.is_main_process:
        card = make_scorecard(measured, plan.published, plan.tasks, setting, notes)
        print(as_table(card))
        if args.output:
            write_card(card, args.output)
    accelerator.end_training()


# ---- what is measured ----


@dataclasses.dataclass
class Subject:
    """A model that is to be measured; opened when the first task needs it.

    name: for the table. given: as the user named it. path: as find_model found it.
    """

    name: str
    given: str
    path: str
    is_reference: bool
    trust_remote_code: bool
    opened: tuple[Any, Any] | None = None

    def open(self, dtype: str, accelerator: Accelerator) -> tuple[Any, Any]:
        """The model, on the accelerator's device, and its tokenizer."""
        if self.opened is None:
            with accelerator.main_process_first():  # the other ranks find downloads and remote code in the caches
                model, tokenizer = open_model(self.path, dtype, self.trust_remote_code)
            self.opened = model.to(accelerator.device), tokenizer
            if accelerator.mixed_precision == "no":  # packed weights do not take part in autocast
                pack_weights(model)
        return self.opened

    def tokenizer(self) -> Any:
        if Path(self.path).is_file():
            return open_model(self.path)[1]
        return load_tokenizer(self.path, self.trust_remote_code)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Models and tasks, in the order of the table."""

    subjects: list[Subject]
    published: list[OpenAIModel]
    tasks: list[Task]
    vocabularies: dict[str, str]


def make_plan(args: argparse.Namespace, notes: list[str]) -> Plan:
    """Find the models and read the data of the tasks.

    Args:
        notes: lines for the reader are added to it.
    Raises:
        UserError: all mistakes that can be found before anything is measured.
    """
    problems = check_card(args)
    subjects, published = find_models(args, problems, notes)
    tasks = load_tasks(args, problems, notes)
    data = []
    if args.data:
        try:
            data = [PreparedData.open(args.data, args.validation_tokens)]
        except UserError as error:
            problems += str(error).splitlines()
    if not problems and not tasks and not data:
        problems += [*notes, "nothing is left to measure; give --task_data NAME=FILE, --data DIR or --text FILE"]
    refuse(problems)
    vocabularies = {subject.name: vocabulary_sha256(subject.tokenizer()) for subject in subjects}
    for prepared in data:
        task = validation_task(prepared)
        suits = [vocabulary == task.vocabulary for vocabulary in vocabularies.values()]
        own = [task] if any(suits) else []
        as_text = [] if all(suits) else [validation_text_task(prepared, args.stride)]
        tasks = [*own, *as_text, *tasks]
    return Plan(subjects, published, tasks, vocabularies)


def find_models(
    args: argparse.Namespace, problems: list[str], notes: list[str]
) -> tuple[list[Subject], list[OpenAIModel]]:
    """The models to measure, and those of OpenAI's of which published figures stand in the card."""
    subjects: list[Subject] = []
    published = []
    for number, given in enumerate([*args.models, *(args.against or [])]):
        is_reference = number >= len(args.models)
        openai = openai_model(given)
        try:
            path = find_model(given)
        except UserError as error:
            if is_reference and openai:
                stand_in = "its published figures, if any, stand in the table"
                notes.append(f"{openai.title} cannot be had here ({error}); {stand_in}")
                published.append(openai)
            else:
                problems += str(error).splitlines()
            continue
        taken = [subject.name for subject in subjects]
        name = unique(openai.title if openai and not Path(path).exists() else display_name(path), taken)
        subjects.append(Subject(name, given, path, is_reference, args.trust_remote_code))
    if args.against is None:
        published = [openai_models()[DEFAULT_SIZE]]
    return subjects, published


def display_name(path: str) -> str:
    """Of a run's model its run, of a checkpoint also the step; of another folder or file its name."""
    place = Path(path)
    if not place.exists():
        return path
    run = RunFolder.around(place)
    if run is None:
        return place.resolve().name
    return run.path.name if run.model == place.resolve() else f"{run.path.name} {place.resolve().name}"


def unique(name: str, taken: list[str]) -> str:
    """The name, with a number if it is taken."""
    names = [name, *(f"{name} ({number})" for number in range(2, len(taken) + 2))]
    return next(candidate for candidate in names if candidate not in taken)


def load_tasks(args: argparse.Namespace, problems: list[str], notes: list[str]) -> list[Task]:
    """The tasks that are asked for. Of the default ones those are left out that cannot be had."""
    tasks = []
    for name in DEFAULT_TASKS if args.tasks is None else args.tasks:
        if name == "validation":
            continue  # what becomes of it depends on the models' vocabularies
        if name in names_of(args.task_data) and name not in args.task_files:
            continue  # the entry is refused already
        try:
            tasks.append(load_task(name, args))
        except UserError as error:
            if args.tasks or name in args.task_files:
                problems += str(error).splitlines()
            else:
                notes.append(f"{name} is left out: {error}")
    titles: list[str] = []
    for file in args.text:
        titles.append(unique(Path(file).stem, titles))
        try:
            tasks.append(plain_text_task(file, titles[-1], args.stride, args.detokenize))
        except UserError as error:
            problems += str(error).splitlines()
    return tasks


def load_task(name: str, args: argparse.Namespace) -> Task:
    file, flag = args.task_files.get(name), f"--task_data {name}=FILE"
    if name == "hellaswag":
        return hellaswag_task(file, args.limit, flag)
    if name == "lambada":
        return lambada_task(file, args.limit, flag)
    return benchmark_task(name, file, args.limit, flag, args.stride, args.detokenize)


# ---- measuring ----


def measure(
    subject: Subject, plan: Plan, args: argparse.Namespace, accelerator: Accelerator, notes: list[str]
) -> MeasuredModel:
    """A model on every task that suits it, from the cache where it was measured before.

    Args:
        notes: a line is added for each text that the tokenizer cannot write.
    Raises:
        UserError: there is nothing that suits it, or it cannot be opened.
    """
    folder = model_folder(subject.path)
    if folder is None:  # of the Hub, and not downloaded yet
        subject.open(args.dtype, accelerator)
        folder = model_folder(subject.path)
    assert folder is not None, f"{subject.path} was opened, but its files are not in the Hub's cache"
    sha256 = model_sha256(folder)
    vocabulary = plan.vocabularies[subject.name]
    columns: dict[str, Columns] = {}
    parameters = 0
    for task in plan.tasks:
        if task.vocabulary not in (None, vocabulary):
            continue
        settings = {
            "dtype": args.dtype,
            "mixed_precision": accelerator.mixed_precision,
            "device": accelerator.device.type,
            "versions": software_versions(),
        }
        if task.depends_on_windows:
            settings["stride"] = args.stride
        file = cache_file(folder, sha256, task, settings)
        cached = on_main(functools.partial(read_cached, file))
        if cached is None:
            try:
                cached = measure_task(subject, task, args, accelerator)
            except UnsuitableTokenizer as error:  # on all ranks
                notes.append(f"{subject.name} has no score on {task.title}: {error}")
                continue
            if accelerator.is_main_process:
                write_cached(file, task, *cached)
        parameters, columns[task.name] = cached
    if not columns:
        raise UserError(f"{notes[-1]}; choose other --tasks or --text")
    subject.opened = None  # the next model needs the memory
    return MeasuredModel(subject.name, sha256, parameters, vocabulary, columns, subject.is_reference)


def measure_task(
    subject: Subject, task: Task, args: argparse.Namespace, accelerator: Accelerator
) -> tuple[int, Columns]:
    """The number of the model's parameters and the task's columns."""
    model, tokenizer = subject.open(args.dtype, accelerator)
    if accelerator.is_main_process:
        print(f"{subject.name}: {task.title}", file=sys.stderr, flush=True)
    windows = WindowSettings(args.stride, args.batch_size, progress=True)
    return model.num_parameters(), task.measure(model, tokenizer, accelerator, windows)


def write_card(card: dict[str, Any], folder: Path) -> None:
    """Write the card as JSON, Markdown and a picture."""
    as_json, markdown, picture = (folder / name for name in CARD_FILES)
    try:
        folder.mkdir(exist_ok=True)
        write_json(as_json, card)
        write_text(markdown, as_markdown(card))
        draw_scorecard(card, picture)
    except OSError as error:
        raise UserError(
            f"--output {folder} cannot be written ({error.strerror}); what was measured is kept: repeat the command"
        ) from error
    print(f"\nwrote {', '.join(CARD_FILES)} to {folder}")


# ---- two models on one text ----


def compare(args: argparse.Namespace) -> None:
    device = Accelerator(cpu=cpu_asked()).device
    name_a, name_b = args.weights_only
    model_a, tokenizer_a = open_model(name_a, "float32", args.trust_remote_code)
    model_b, tokenizer_b = open_model(name_b, "float32", args.trust_remote_code)
    text = comparison_text(args.text, args.tokens)
    ids = tokenizer_a(text, verbose=False).input_ids
    if ids != tokenizer_b(text, verbose=False).input_ids:
        raise UserError(
            f"{name_a} and {name_b} have different tokenizers; only models with the same can be compared by their "
            "weights (without --weights-only, their scores are compared)"
        )
    positions = [model.config.max_position_embeddings for model in (model_a, model_b)]
    windows = cut_windows(ids, min(*positions, args.tokens), args.tokens)
    comparison = compare_models(model_a.to(device), model_b.to(device), windows, len(tokenizer_a))
    print(f"A: {name_a}\nB: {name_b}\n\n{comparison_table(comparison)}")
    if args.output:
        args.output.write_text(json.dumps(dataclasses.asdict(comparison), indent=2) + "\n")


def cut_windows(ids: list[int], length: int, max_tokens: int) -> torch.Tensor:
    """(N, length + 1) int64: windows that overlap by one token and predict at most `max_tokens`.

    Raises:
        UserError: the text is shorter than one window.
    """
    predicted = max_tokens // length * length
    tokens = torch.tensor(ids[: predicted + 1])
    if len(tokens) <= length:
        raise UserError(f"the text has {len(ids)} tokens, fewer than one window of {length + 1}; give a longer --text")
    return tokens.unfold(0, length + 1, length)


if __name__ == "__main__":
    run_script(main)
