"""Recipes: what is accepted, what is refused, and the arithmetic of a step."""

import dataclasses
import re
import typing
from typing import Literal

import pytest
import torch
import yaml
from support import ROOT

from gpt2repro.errors import UserError
from gpt2repro.recipe import Recipe
from gpt2repro.recipe_file import (
    OTHER_NAMES,
    RECORD_KEYS,
    build_parser,
    default_of,
    differences,
    field_types,
    parse_recipe,
    read_yaml,
)
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
NUMBERS = (int, float, int | None, float | None, int | Literal["auto"])
BOUNDARIES = [  # fields, the last values accepted, the first ones refused, the rule
    ("global_batch_tokens", [1, 2**40], [0, 2**40 + 1], f"at least 1 and at most {2**40}"),
    ("batch_ramp_tokens", [0, 2**40], [-1, 2**40 + 1], f"at least 0 and at most {2**40}"),
    (
        "max_steps micro_batch_size sequence_length log_every checkpoint_every keep_last sample_tokens max_bad_steps",
        [1],
        [0],
        "at least 1",
    ),
    (
        "batch_ramp_start warmup_steps validate_every validation_tokens hellaswag_every sample_every "
        "num_workers keep_every patience max_rollbacks lora_rank",
        [0],
        [-1],
        "at least 0",
    ),
    (
        "learning_rate min_learning_rate weight_decay muon_learning_rate muon_weight_decay max_hours",
        [0.0],
        [-1e-9],
        "at least 0",
    ),
    ("adam_epsilon max_grad_norm sample_temperature spike_zscore", [1e-9], [0.0, -1e-9], "above 0"),
    ("peak_tflops dollars_per_hour", [None, 1e-9], [0.0, -1e-9], "above 0"),
    ("seed", [0, 2**32 - 1], [-1, 2**32], "at least 0 and below 4294967296"),
    ("decay_fraction", [1e-9, 1.0], [0.0, 1 + 1e-9], "above 0 and at most 1"),
    ("adam_beta1 adam_beta2 muon_momentum", [0.0, 1 - 1e-9], [-1e-9, 1.0], "at least 0 and below 1"),
]


def parse(tmp_path, text, *argv):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return parse_recipe(["--config", str(path), *argv], path, GPT2ReproConfig)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("num_processes", [1, 8])
def test_shipped_recipes_are_valid(path, num_processes):
    recipe, problems = parse_recipe(["--config", str(path)], path, GPT2ReproConfig)
    assert problems == []
    if num_processes == 1 or "124m" in path.stem:
        assert recipe.problems(num_processes) == []
    GPT2ReproConfig(**{"vocab_size": 50304} | recipe.model)


def test_shipped_recipes_keep_the_numbers_of_their_sources():
    def read(name):
        return parse_recipe(["--config", str(ROOT / "recipes" / f"{name}.yaml")], ROOT, GPT2ReproConfig)[0]

    edu, fineweb, owt = (read(f"gpt2-124m-{name}") for name in ("fineweb-edu", "fineweb", "openwebtext"))
    assert (edu.max_steps, edu.warmup_steps, edu.global_batch_tokens) == (19073, 715, 2**19)
    assert (edu.learning_rate, edu.min_learning_rate, edu.weight_decay, edu.adam_beta2) == (6e-4, 6e-5, 0.1, 0.95)
    assert (fineweb.warmup_steps, fineweb.min_learning_rate) == (700, 0)
    assert fineweb.max_steps * fineweb.global_batch_tokens == 10_255_073_280  # the last row of llm.c's log
    muon, tuned = read("gpt2-124m-fineweb-muon"), read("gpt2-124m-fineweb-adamw-tuned")
    assert (muon.optimizer, muon.max_steps, int(muon.wsd_decay_start)) == ("muon", 6200, 6200 - 1800)
    assert (muon.learning_rate, muon.weight_decay, muon.warmup_steps) == (3.6e-3, 0, 0)
    assert muon.muon_learning_rate == pytest.approx(3.6e-4 * 768**0.5, rel=5e-3)
    assert (tuned.optimizer, tuned.max_steps, int(tuned.wsd_decay_start)) == ("adamw", 9536, 9536 - 2000)
    assert (tuned.learning_rate, tuned.warmup_steps) == (1.8e-3, 250)
    for recipe in (muon, tuned):
        assert recipe.model == fineweb.model and recipe.global_batch_tokens == fineweb.global_batch_tokens
    assert owt.global_batch_tokens == 12 * 1024 * 5 * 8 and owt.accumulation(8, 0) == 5 and owt.max_steps == 600_000


@pytest.mark.parametrize(
    "name, steps, batch_tokens, peak, end, parameters",  # llm.c scripts/run_gpt2_{350M,774M,1558M}.sh
    [
        ("gpt2-medium-fineweb", 60_000, 2**19, 3e-4, 0, 354_871_296),
        ("gpt2-large-fineweb", 286_102, 2**19, 2.5e-4, 0, 774_090_240),
        ("gpt2-xl-fineweb-edu", 32_000, 2**20, 6e-4, 6e-5, 1_557_686_400),
    ],
)
def test_larger_recipes_match_llmc(name, steps, batch_tokens, peak, end, parameters):
    recipe, problems = parse_recipe(["--config", str(ROOT / "recipes" / f"{name}.yaml")], ROOT, GPT2ReproConfig)
    assert not problems and not recipe.problems(8)
    assert (recipe.max_steps, recipe.global_batch_tokens) == (steps, batch_tokens)
    assert (recipe.learning_rate, recipe.min_learning_rate, recipe.warmup_steps) == (peak, end, 700)
    with torch.device("meta"):  # OpenAI's sizes plus 47 padding rows of the embedding
        assert GPT2ReproForCausalLM(GPT2ReproConfig(**recipe.model)).num_parameters() == parameters


def test_flags_override_yaml_and_yaml_overrides_defaults(tmp_path):
    text = "learning_rate: 6e-4\nmax_steps: 100\nseed: 7\nmodel: {n_layer: 3, n_head: 2}"
    recipe, problems = parse(tmp_path, text, "--max_steps", "50", "--model.n_layer", "5", "--compile", "--seed=9")
    assert problems == []
    assert (recipe.learning_rate, recipe.max_steps, recipe.seed, recipe.compile) == (6e-4, 50, 9, True)
    assert recipe.model == {"n_layer": 5, "n_head": 2}
    assert recipe.weight_decay == Recipe().weight_decay


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown recipe field learning_rat; did you mean learning_rate?"),
        ("model: {n_layr: 1}", "unknown recipe field model.n_layr; did you mean model.n_layer?"),
        ("max_steps: 1.5", "max_steps=1.5 is not a whole number"),
        ("max_steps: true", "max_steps=True is not a whole number"),
        ("learning_rate: fast", "learning_rate='fast' is not a finite number"),
        ("learning_rate: .nan", "learning_rate=nan is not a finite number"),
        ("compile: 1", "compile=1 is not true or false"),
        ("sampling: often", "sampling='often' is not one of shuffle, sequential, random"),
        ("max_steps:", "max_steps=None is not a whole number"),
        ("model: 3", "model=3 is not a table of the model's fields"),
        ("reference_losses: [1]", "reference_losses=[1] is not a table of name: number"),
    ],
)
def test_an_invalid_field_is_reported_in_one_line(tmp_path, text, message):
    assert parse(tmp_path, text)[1] == [message]


def test_an_unknown_flag_is_reported_with_the_nearest_name(tmp_path):
    assert parse(tmp_path, "", "--max_step", "3")[1] == ["unknown recipe field --max_step; did you mean --max_steps?"]
    assert parse(tmp_path, "", "--max_steps", "3", "4")[1] == ["unexpected argument '4'; flags are --field value"]
    (about_recipe,) = parse(tmp_path, "", "recipes/demo.yaml")[1]
    assert about_recipe == "unexpected argument 'recipes/demo.yaml'; a recipe is given with --config recipes/demo.yaml"
    about_flag, about_word = parse(tmp_path, "", "--lr=3", "word")[1]
    assert "--lr=3" in about_flag and about_word == "unexpected argument 'word'; flags are --field value"


@pytest.mark.parametrize(
    ("flag", "remedy"),
    [
        ("--dropout", "here it is model.resid_pdrop, model.embd_pdrop and model.attn_pdrop"),
        ("--lr", "here it is learning_rate"),
        ("--n_layer", "did you mean --model.n_layer?"),
        ("--model.n_layr", "did you mean --model.n_layer?"),
        ("--quux", "see --help"),
    ],
)
def test_a_field_of_another_trainer_is_reported_with_its_name_here(tmp_path, flag, remedy):
    assert parse(tmp_path, "", flag, "0.1")[1] == [f"unknown recipe field {flag}; {remedy}"]


def test_names_of_other_trainers_lead_to_fields_that_exist():
    known = field_types(GPT2ReproConfig)
    for name, here in OTHER_NAMES.items():
        assert name not in known
        assert re.match(r"[\w.]+", here)[0] in known, name


def test_a_list_is_given_by_a_flag(tmp_path):
    recipe, problems = parse(tmp_path, "", "--sample_prompts", "One day", "B", "--seed", "3")
    assert problems == [] and (recipe.sample_prompts, recipe.seed) == (["One day", "B"], 3)
    assert parse(tmp_path, "", "--sample_prompts", "A")[0].sample_prompts == ["A"]
    assert parse(tmp_path, "", "--sample_prompts=-1")[0].sample_prompts == ["-1"]


def test_home_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    recipe, problems = parse(tmp_path, "data_dir: ~/d\ninit_from: ~/m\nhellaswag_data: ~/h", "--output_dir=~/x")
    paths = (recipe.data_dir, recipe.init_from, recipe.hellaswag_data, recipe.output_dir)
    assert problems == [] and paths == ("/home/me/d", "/home/me/m", "/home/me/h", "/home/me/x")
    assert parse(tmp_path, "", "--data", "~/a=1", "b~=2")[0].data == {"/home/me/a": 1.0, "b~": 2.0}
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("max_steps: 7")
    assert parse_recipe(["--config=~/mine.yaml"], tmp_path, GPT2ReproConfig)[0].max_steps == 7


def test_help_shows_choices_and_the_models_fields():
    text = " ".join(build_parser(GPT2ReproConfig).format_help().split())
    assert "--lr_schedule {cosine,linear,constant,wsd}" in text and "--compile [{true,false}]" in text
    assert "--model.n_layer VALUE a whole number (default: 12)" in text
    assert "--sample_prompts VALUE [VALUE ...]" in text


@pytest.mark.parametrize(
    ("data", "sources"),
    [
        ({"manifest_sha256": "ab", "corpus": {"name": "x"}}, {"data/mine": 1.0}),
        (
            {
                "manifest_sha256": "ab",
                "sources": [{"directory": "a", "weight": 0.7}, {"directory": "b", "weight": 0.3}],
            },
            {"a": 0.7, "b": 0.3},
        ),
    ],
)
def test_the_record_of_a_run_is_a_recipe(tmp_path, data, sources):
    ran = Recipe(data_dir="data/mine" if len(sources) == 1 else "", max_steps=7, warmup_steps=1, model={"n_layer": 3})
    record = dataclasses.asdict(ran) | dict.fromkeys(RECORD_KEYS, "recorded") | {"data": data}
    recipe, problems = parse(tmp_path, yaml.safe_dump(record), "--output_dir", "runs/again")
    assert problems == [] and recipe.sources == sources
    assert dataclasses.replace(recipe, data={}) == dataclasses.replace(ran, output_dir="runs/again")


def test_the_record_of_an_older_version_is_a_recipe():
    recipe, problems = parse_recipe(["--config", str(ROOT / "tests/golden/run/recipe.yaml")], ROOT, GPT2ReproConfig)
    assert problems == [] and recipe.sources == {"data": 1.0}


@pytest.mark.parametrize(
    ("text", "flags", "sources"),
    [
        ("", "", {"data/fineweb-edu": 1.0}),
        ("data_dir: x", "", {"x": 1.0}),
        ("data: {x: 0.7, y: 3e-1}", "", {"x": 0.7, "y": 0.3}),
        ("data_dir: x", "--data y=0.7 z=b=3 --seed 5", {"y": 0.7, "z=b": 3.0}),
        ("data: {x: 0.7, y: 0.3}", "--data_dir z", {"z": 1.0}),
        ("data: {x: 0.7, y: 0.3}", "--data z=1", {"z": 1.0}),
    ],
)
def test_sources_are_data_or_data_dir_and_flags_replace_the_files(tmp_path, text, flags, sources):
    recipe, problems = parse(tmp_path, text, *flags.split())
    assert problems == [] and recipe.sources == sources
    assert list(recipe.sources) == list(sources)  # the order matters
    assert bool(recipe.data) != bool(recipe.data_dir)


@pytest.mark.parametrize(
    ("text", "flags", "problem"),
    [
        ("data_dir: x\ndata: {y: 1}", "", "data and data_dir are both given; list every directory in data"),
        ("", "--data_dir x --data y=1", "data and data_dir are both given; list every directory in data"),
        ("", "--data x y", "data=['x', 'y'] is not a list of DIR=WEIGHT"),
        ("", "--data x=much", "data=['x=much'] is not a list of DIR=WEIGHT"),
        ("", "--data x=0.5 x=0.5", "data=['x=0.5', 'x=0.5'] is not a list of DIR=WEIGHT"),
        ("data: x", "", "data='x' is not a table of name: number"),
    ],
)
def test_mistakes_in_data_are_reported_in_one_line(tmp_path, text, flags, problem):
    (found,) = parse(tmp_path, text, *flags.split())[1]
    assert found.startswith(problem)


@pytest.mark.parametrize("text", ["- a\n- b", "a: [", "just text"])
def test_a_file_that_is_not_a_table_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="--config"):
        parse(tmp_path, text)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        parse_recipe(["--config", str(tmp_path / "no.yaml")], tmp_path, GPT2ReproConfig)


def test_all_problems_are_reported_at_once():
    recipe = Recipe(max_steps=0, adam_beta2=1.0, max_grad_norm=0, min_learning_rate=1.0, push_to_hub=True)
    found = "\n".join(recipe.problems(1))
    for name in ("max_steps=0", "adam_beta2=1.0", "max_grad_norm=0", "min_learning_rate=1.0", "hub_model_id"):
        assert name in found


@pytest.mark.parametrize(("names", "accepted", "refused", "rule"), BOUNDARIES)
def test_bounds_accept_their_limit_and_refuse_what_is_beyond(names, accepted, refused, rule):
    for name in names.split():
        complaint = f"{name}={{}} must be {rule}"
        for value in accepted:
            assert complaint.format(value) not in Recipe(**{name: value}).problems(1)
        for value in refused:
            assert complaint.format(value) in Recipe(**{name: value}).problems(1)


def test_every_number_has_bounds_that_a_test_crosses():
    tested = " ".join(names for names, *_ in BOUNDARIES).split()
    numbers = [name for name, hint in typing.get_type_hints(Recipe).items() if hint in NUMBERS]
    assert sorted(tested) == sorted(numbers)
    assert sorted(tested) == sorted(f.name for f in dataclasses.fields(Recipe) if f.metadata["bounds"])


def test_hellaswag_data_must_exist(tmp_path):
    missing, items = tmp_path / "missing.jsonl", tmp_path / "items.jsonl"
    items.write_text("")
    assert Recipe(hellaswag_data=str(items)).problems(1) == []
    (problem,) = Recipe(hellaswag_data=str(missing)).problems(1)
    assert problem == f"hellaswag_data={missing} must be a HellaSwag file, .jsonl or .jsonl.gz"


def test_help_lists_every_field_in_its_group_with_its_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no line is wrapped
    text = build_parser(GPT2ReproConfig).format_help()
    _, *parts = re.split(r"^(\S.*):\n", text, flags=re.MULTILINE)
    sections = dict(zip(parts[::2], parts[1::2]))
    groups = list(dict.fromkeys(f.metadata["group"] for f in dataclasses.fields(Recipe)))
    assert list(sections) == ["options", *groups]
    for f in dataclasses.fields(Recipe):
        section = sections[f.metadata["group"]]
        assert f"  --{f.name} " in section or f"  {f.name} (in the recipe file): " in section, f.name
        assert f"{f.metadata['help']} (default: {default_of(f)})\n" in section, f.name


@pytest.mark.parametrize(
    ("tokens", "micro", "length", "processes", "remedies"),
    [
        (500_000, 64, 1024, 8, ["524288"]),
        (1_000_000, 64, 1024, 8, ["524288", "1048576"]),
        (524_288, 48, 1024, 8, ["393216", "786432", "micro_batch_size=32"]),
    ],
)
def test_an_indivisible_batch_is_reported_with_sizes_that_divide(tokens, micro, length, processes, remedies):
    recipe = Recipe(global_batch_tokens=tokens, micro_batch_size=micro, sequence_length=length)
    (problem,) = recipe.problems(processes)
    for remedy in remedies:
        assert remedy in problem
        number = int(remedy.split("=")[-1])
        fixed = {"micro_batch_size": number} if "micro" in remedy else {"global_batch_tokens": number}
        assert dataclasses.replace(recipe, **fixed).problems(processes) == []


def test_a_micro_batch_that_is_still_to_be_chosen_holds_at_least_one_sequence(tmp_path):
    by_flag, _ = parse(tmp_path, "global_batch_tokens: 524288", "--micro_batch_size", "auto")
    in_file, problems = parse(tmp_path, "micro_batch_size: auto\nglobal_batch_tokens: 524288")
    assert by_flag == in_file and in_file.micro_batch_size == "auto" and not problems
    assert in_file.problems(512) == []
    (problem,) = in_file.problems(3)
    assert problem.startswith("global_batch_tokens=524288 is not a multiple of 1 x 1024 x 3 = 3072 ")
    (problem,) = dataclasses.replace(in_file, batch_ramp_start=1024, batch_ramp_tokens=10**6).problems(2)
    assert "be a multiple of 2048" in problem and "use 2048" in problem
    _, problems = parse(tmp_path, "micro_batch_size: automatic")
    assert problems == ["micro_batch_size='automatic' is not a whole number or auto"]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (
            {"lr_schedule": "wsd", "max_steps": 1000, "decay_fraction": 0.4},
            "warmup_steps=715 must be at most 600, where the decay begins (max_steps=1000 x (1 - decay_fraction=0.4)); "
            "lower warmup_steps or decay_fraction",
        ),
        ({"lr_schedule": "wsd", "decay_fraction": 0}, "decay_fraction=0 must be above 0 and at most 1"),
        (
            {"lr_schedule": "linear", "min_learning_rate": 1},
            "min_learning_rate=1 must be at most learning_rate=0.0006; change one of them",
        ),
        ({"muon_momentum": 1.0}, "muon_momentum=1.0 must be at least 0 and below 1"),
        (
            {"optimizer": "muon", "learning_rate": 0, "min_learning_rate": 0},
            "learning_rate=0 must be above 0 with muon, whose learning rate is a multiple of it",
        ),
        (
            {"batch_ramp_start": 65536},
            "batch_ramp_start=65536 and batch_ramp_tokens=0: a ramp needs both; set both, or neither",
        ),
        (
            {"batch_ramp_tokens": 10},
            "batch_ramp_start=0 and batch_ramp_tokens=10: a ramp needs both; set both, or neither",
        ),
        ({"batch_ramp_start": -1}, "batch_ramp_start=-1 must be at least 0"),
        (
            {"eval_only": True},
            "init_from=scratch is untrained; with eval_only, set --init_from to a run or a model",
        ),
        (
            {"patience": 2, "validate_every": 0},
            "patience=2 counts validations, but validate_every=0 runs none; change one of them",
        ),
    ],
)
def test_contradictions_are_reported_in_one_line(fields, problem):
    assert Recipe(**fields).problems(1) == [problem]


@pytest.mark.parametrize(
    ("start", "processes", "remedies"),
    [(100_000, 1, [65_536, 131_072]), (196_608, 1, [131_072, 262_144]), (65_536, 2, [131_072, 262_144])],
)
def test_an_indivisible_ramp_is_reported_with_starts_that_divide(start, processes, remedies):
    """524,288 tokens per step in micro-batches of 65,536 per rank."""
    recipe = Recipe(batch_ramp_start=start, batch_ramp_tokens=10**9)
    (problem,) = recipe.problems(processes)
    assert problem.endswith(f"use {remedies[0]} or {remedies[1]}")
    for remedy in remedies:
        assert dataclasses.replace(recipe, batch_ramp_start=remedy).problems(processes) == []


def test_only_fields_that_change_the_result_make_it_another_run():
    recipe = Recipe()
    assert differences(recipe, dataclasses.asdict(dataclasses.replace(recipe, micro_batch_size=1, log_every=7))) == []
    (difference,) = differences(recipe, dataclasses.asdict(dataclasses.replace(recipe, learning_rate=1e-3)))
    assert difference == "learning_rate=0.001 there, 0.0006 here"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("seed: 1\nseed: 2", "line 2: seed is given twice"),
        ("model: {n_layer: 1, n_layer: 2}", "line 1: n_layer is given twice"),
        ("\nseed: 010", "line 2: 010 is read as 8; write a decimal number"),
        ("max_hours: 1:30", "line 1: 1:30 is read as 90; write a decimal number"),
        ("sample_prompts: &a [x]\nmodel: *a", "line 2: write the value out"),
        ("seed: [", "line 1"),
        ("seed: \udcff", "cannot be read"),
    ],
)
def test_yaml_that_surprises_is_refused(tmp_path, text, complaint):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=complaint) as error:
        read_yaml(path)
    assert len(str(error.value).splitlines()) == 1
