"""Every command in README.md and docs/*.md: its flags, files and recipes exist, and all that can run here does, on
small stand-ins.

A command is a line of a fenced block without a language, or of bash, and of an indented block; tag a block that shows
anything else as text. A command that no rule below knows fails.
"""

import ast
import functools
import importlib
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from markdown_it import MarkdownIt
from support import ROOT, prepare

from gpt2repro import planner
from gpt2repro.errors import UserError
from gpt2repro.model_fields import model_fields
from gpt2repro.recipe_file import parse_recipe


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELLS = {"", "bash", "sh", "shell", "console"}
ONLY_CHECKED = {  # commands whose flags and files are checked, but which are not run, and why
    r"make \w+": "make demo trains for minutes, and make test would run this test",
    r"pip install .*": "changes the environment that runs this test",
    r"source .*": "the environment is active",
    r"python prepare_data\.py (fineweb|openwebtext).*": "downloads gigabytes; see test_hub_corpora.py",
    r"python prepare_data\.py .*--dedup.*": "tests/prepare/test_prepare_deduplicated.py runs it",
    r"python publish\.py you/.*": "opens a model on the Hub; tests/hub/test_hub.py does so on loopback",
    r"python publish\.py .*--format gguf.*": "the stand-in has no byte-level BPE; tests/hub/test_publish.py",
    r"python benchmarks/.*": "measures for minutes",
    r"python -c (.*sysconfig.*|(?!.*(runs|data|publish)/).*)": "tests/test_lecture.py",
    r"sbatch .*": "needs Slurm; tests/test_slurm_train.py plays it",
    r"(tensorboard|trackio|wandb|lm_eval|ct2-\S+|hf|kubectl|sky|scripts/\w+\.sh) .*": "for other machines or projects",
    r"python train_accelerate\.py .*--report_to.*": "tests/train/test_tracker.py",
    r"accelerate launch .*--report_to.*": "tests/train/test_tracker.py",
}
TOOLS = {"cat", "cp", "echo", "grep", "head", "ls", "mkdir", "tail"}  # run as they stand
OTHER_PROGRAMS = {"lm_eval", "source", "tensorboard", "trackio", "wandb"}
OTHER_PROGRAMS |= {"ct2-transformers-converter", "hf", "kubectl", "sky"}

# A recipe of any size becomes a model of a few thousand parameters that trains for two steps on a line of text.
SMALL_RUN = shlex.split("""
    --max_steps 2 --warmup_steps 1 --global_batch_tokens 64 --micro_batch_size 2 --sequence_length 32
    --batch_ramp_tokens 0 --compile false --validation_tokens 64 --validate_every 0 --hellaswag_every 0 --sample_every 0
    --sample_tokens 2 --num_workers 0 --patience 0 --data_dir data/stand-in""")
SMALL_MODEL = shlex.split("""--model.n_positions 64 --model.n_layer 1 --model.n_head 2 --model.n_embd 32
    --model.vocab_size 128""")


def commands_of(page: Path) -> list[str]:
    """The commands of a page, in order, each on one line."""
    blocks = [token for token in MarkdownIt().parse(page.read_text()) if token.type in ("fence", "code_block")]
    shell = [block for block in blocks if block.info.strip() in SHELLS]
    lines = [line for block in shell for line in re.sub(r"\\\n\s*", " ", block.content).splitlines()]
    return [line for line in lines if parts_of(line)]


def parts_of(line: str) -> list[list[str]]:
    """The words of each program that a line starts, without comments, redirections and variables set before it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|&;"):
            parts.append([])
        elif set(word) <= set("<>"):
            next(lexer)  # the file
        elif parts[-1] or not re.match(r"[A-Z_]+=", word):
            parts[-1].append(word)
    return [words for words in parts if words]


@functools.cache
def all_commands() -> dict[str, list[list[str]]]:
    """Each command, with its parts."""
    return {command: parts_of(command) for page in PAGES for command in commands_of(page)}


def is_only_checked(parts: list[list[str]]) -> bool:
    return any(re.fullmatch(pattern, shlex.join(words)) for pattern in ONLY_CHECKED for words in parts)


# ---- what can be told without running it ----


def problems_of(words: list[str]) -> list[str]:
    """What is wrong with a command's program, flags, files and recipe."""
    program, *words = words
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return [f"the Makefile has no target {word}" for word in words if word not in targets]
    if program == "pip":
        return pip_problems(words)
    if program == "sbatch":
        (script,) = (i for i, word in enumerate(words) if word.endswith(".sbatch"))
        return missing(words[script]) + recipe_problems(words[script + 1 :])
    if program == "accelerate":
        return launch_problems(words[1:])
    if program == "python" and words[0] == "scripts/launch.py":
        return missing(words[0]) + launch_problems(words[1:])
    if program == "python" and words[0] == "-c":
        ast.parse(words[1])
        return []
    if program == "python":
        return python_problems(words)
    if program.startswith("scripts/"):
        return missing(program) + recipe_problems(words)
    if program in TOOLS | OTHER_PROGRAMS:
        return [line for word in words if word.startswith(("scripts/", "recipes/")) for line in missing(word)]
    return [f"no rule of tests/test_docs_commands.py knows {program}"]


def missing(path: str) -> list[str]:
    return [] if (ROOT / path).exists() else [f"{path} does not exist"]


def pip_problems(words: list[str]) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = project["optional-dependencies"].keys()
    asked = {extra for word in words for found in re.findall(r"\[(.*)\]", word) for extra in found.split(",")}
    files = [words[i + 1] for i, word in enumerate(words) if word == "-c"]
    return [f"no extra [{extra}]" for extra in sorted(asked - known)] + [
        line for file in files for line in missing(file)
    ]


def launch_problems(words: list[str]) -> list[str]:
    try:
        args = launch_command_parser().parse_args(words)
    except SystemExit:
        return ["accelerate launch refuses its flags"]
    return missing(args.config_file or "") + python_problems([args.training_script, *args.training_script_args])


def python_problems(words: list[str]) -> list[str]:
    script = words[0] if words[0] != "-m" else words[1].replace(".", "/") + ".py"
    flags = words[1:] if words[0] != "-m" else words[2:]
    if missing(script):
        return missing(script)
    if script == "train_accelerate.py" and flags != ["--help"]:
        return recipe_problems(flags)
    if script == "gpt2repro/planner.py":
        return refusal_of(planner.main, flags)
    used = {word.split("=")[0] for word in flags if word.startswith("--")}
    return [f"{script} has no flag {flag}" for flag in sorted(used - flags_of(ROOT / script) - {"--help"})]


def flags_of(script: Path) -> set[str]:
    """The flags that a script defines, read from its source."""
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    names = [argument for call in calls if ast.unparse(call.func).endswith("add_argument") for argument in call.args]
    return {name.value for name in names if isinstance(name, ast.Constant)}


def recipe_problems(flags: list[str]) -> list[str]:
    try:
        recipe, problems = parse_recipe(flags, ROOT / "recipes" / "demo.yaml", model_fields())
    except UserError as error:
        return [str(error)]
    return problems or recipe.bound_problems() + recipe.schedule_problems()


def refusal_of(main, flags) -> list[str]:
    try:
        main(flags)
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    return []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one_that_its_program_accepts(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    wrong = [
        (words, line) for command in commands_of(page) for words in parts_of(command) for line in problems_of(words)
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("make dmeo", "no target dmeo"),
        ("pip install -e '.[offlin]'", "no extra [offlin]"),
        ("python benchmarks/ladder.py --small", "no flag --small"),
        ("python train_accelerate.py --config recipes/demo.yaml --max_step 3", "--max_step"),
        ("python train_accelerate.py --config recipes/gone.yaml", "recipes/gone.yaml"),
        ("accelerate launch --config_file accelerate_configs/gone.yaml sample.py x", "gone.yaml does not exist"),
        ("accelerate launch --config_file accelerate_configs/cpu.yaml train_accelerate.py --max_steps 0", "max_steps"),
        ("python -m gpt2repro.planner recipes/demo.yaml --num_gpus 0", "--num_gpus"),
        ("sbatch scripts/slurm_train.sbatch --config recipes/gone.yaml", "gone.yaml"),
        ("curl example.com", "no rule"),
    ],
)
def test_a_command_that_has_gone_wrong_is_found(command, problem, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert any(problem in line for words in parts_of(command) for line in problems_of(words))


@pytest.mark.parametrize("pattern", ONLY_CHECKED)
def test_every_exception_is_needed(pattern):
    assert any(re.fullmatch(pattern, shlex.join(words)) for parts in all_commands().values() for words in parts)


# ---- running it ----


@pytest.fixture(scope="module")
def sandbox(topics, trainer_server, tmp_path_factory) -> Path:
    """A folder that looks like a checkout in which all that the documents speak of has been made, but small."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("recipes", "accelerate_configs", "LICENSE"):
        (folder / name).symlink_to(ROOT / name)
    commands = "\n".join(all_commands())
    made = set(re.findall(r"(?:>|cp \S+) (\S+)", commands))  # by the commands themselves
    write_texts(folder, "\n\n".join(topics[:8])[:40_000], set(re.findall(r"--source (\S+)", commands)) - made)
    prepare("files", "--source", folder / "FOLDER" / "a.txt", "--tokenizer", "char", "--output_dir", folder / "tokens")
    run_train(trainer_server, folder, [*SMALL_RUN, "--data_dir", "tokens", *SMALL_MODEL, "--output_dir", "run"])
    with_adapter = set(re.findall(r"(runs/[\w-]+)/adapter", commands))
    if with_adapter:
        adapter = ["--data_dir", "tokens", "--init_from", "run", "--lora_rank", "2", "--output_dir", "lora"]
        run_train(trainer_server, folder, [*SMALL_RUN, *adapter])

    (folder / "data" / "stand-in").symlink_to(folder / "tokens")
    read = re.sub(r"--output_dir\W+[\w/-]+", "", commands)  # what is only written must not be there
    for name in set(re.findall(r"\b(?:data|runs|publish)/[\w-]+\b(?!\.)", read)) | {"./converted", "./plain"}:
        if name.startswith("data/"):
            (folder / name).symlink_to(folder / "tokens")
        elif name.startswith("runs/"):
            shutil.copytree(folder / ("lora" if name in with_adapter else "run"), folder / name)
        else:
            shutil.copytree(folder / "run" / "model", folder / name)
    save_nanogpt(folder / "nanogpt" / "out" / "ckpt.pt")
    return folder


def write_texts(folder: Path, text: str, sources: set[str]) -> None:
    """A folder of documents, a dataset, and whatever else commands prepare tokens from."""
    for name in ("FOLDER", "owner/dataset", "data", "nanogpt/out"):
        (folder / name).mkdir(parents=True)
    (folder / "FOLDER" / "a.txt").write_text(text)
    (folder / "FOLDER" / "b.md").write_text(text[:1000])
    rows = [f"row {number} of a dataset" for number in range(300)]
    (folder / "owner" / "dataset" / "rows.jsonl").write_text("".join(f'{{"content": "{row}"}}\n' for row in rows))
    for source in sources - {"FOLDER"}:
        if source.endswith(".jsonl"):
            (folder / source).write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
        else:
            (folder / source).symlink_to(folder / "FOLDER")


def save_nanogpt(path: Path) -> None:
    """A checkpoint as nanoGPT's train.py writes it, whose parameters have our names."""
    import torch
    from tiny_models import tiny_model

    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "bias": True}
    model = tiny_model(n_positions=16, vocab_size=50304, unpadded_vocab_size=50304, **sizes)
    args = sizes | {"block_size": 16, "vocab_size": 50304, "dropout": 0.0}
    torch.save({"model": model.state_dict(), "model_args": args, "iter_num": 1, "config": {}}, path)


def run_train(server, folder: Path, flags: list[str]) -> list[str]:
    log = folder / "log"
    log.write_text("")
    pid = server.start(["train_accelerate.py", *flags], log, log, before=[functools.partial(os.chdir, folder)])
    return [] if server.wait(pid) == 0 else [log.read_text()]


def stand_in(words: list[str], number: int) -> tuple[str, list[str]]:
    """The script and the flags with which a command is run here: its own, then those that make it small."""
    program, *words = words
    if program == "accelerate" or words[0] == "scripts/launch.py":
        args = launch_command_parser().parse_args(words[1:])
        words = [args.training_script, *args.training_script_args]
    script, *flags = words[1:] if words[0] == "-m" else words
    made = f"made/{number}"
    if script == "train_accelerate.py":
        if "--init_from" in flags:
            small = [*SMALL_RUN, "--init_from", "runs/demo", "--data_dir", "data/stand-in", "--output_dir", made]
            return script, last_of_each([*flags, *small])
        return script, last_of_each([*flags, *SMALL_RUN, *SMALL_MODEL, "--output_dir", made])
    if script == "prepare_data.py":
        small = ["--num_workers", "1"] if "--num_workers" in flags else []
        small += ["--tokenizer", "bpe:300"] if "bpe:8192" in flags else []
        small += ["--tokenizer", "char"] if "owner/dataset" in flags else []
        small += ["--val_tokens", "500"] if "--val_tokens" in flags else []
        return script, [*flags, *small, *(["--output_dir", made] if "--output_dir" in flags else [])]
    if script == "scorecard.py" and "--weights-only" not in flags:
        return script, [*flags, "--data", "data/stand-in", "--tasks", "validation"]
    if script == "sample.py":
        return script, [*flags, "--num_samples", "1", "--max_new_tokens", "2"]
    if script == "publish.py":
        places = {"--to": f"./{made}/model", "--space": f"./{made}/space"}
        return script, [*flags, *(word for flag in places if flag in flags for word in (flag, places[flag]))]
    return script, flags


def last_of_each(flags: list[str]) -> list[str]:
    """The flags that count where some are given twice, so that commands which are the same when small run once."""
    values: dict[str, list[str]] = {}
    for word in flags:
        if word.startswith("--"):
            flag, values[word] = word, []
        else:
            values[flag].append(word)
    return [word for flag in sorted(values) for word in (flag, *values[flag])]


def main_of(script: str):
    return importlib.import_module(script.removesuffix(".py")).main


@pytest.mark.slow
def test_every_command_that_can_run_here_runs(sandbox, trainer_server, monkeypatch, capsys):
    monkeypatch.chdir(sandbox)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    failed, done = {}, set()
    runnable = {command: parts for command, parts in all_commands().items() if not is_only_checked(parts)}
    for number, (command, parts) in enumerate(runnable.items()):
        if {words[0] for words in parts} <= TOOLS:
            status = subprocess.run(command, shell=True).returncode
            problems = [] if status == 0 or (status == 1 and parts[-1][0] == "grep") else [f"exit code {status}"]
        elif parts[0][:2] == ["python", "-c"]:
            problems = refusal_of(functools.partial(exec, parts[0][2]), {"__name__": "__main__"})
        else:
            script, flags = stand_in(parts[0], number)
            same = (script, tuple(word for word in flags if not word.startswith(("made/", "./made/", "recipes/"))))
            if "--help" in flags or same in done:
                continue
            done.add(same)
            is_training = script == "train_accelerate.py"
            problems = run_train(trainer_server, sandbox, flags) if is_training else refusal_of(main_of(script), flags)
        if problems:
            failed[command] = problems
    assert not failed, "\n\n".join(f"{command}\n{problems[0]}" for command, problems in failed.items())
    assert len(done) > 20
