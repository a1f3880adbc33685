"""Reading recipes: defaults, then the YAML file, then the flags. All mistakes are reported together."""

import argparse
import dataclasses
import difflib
import math
import os
import re
import typing
from collections.abc import Iterable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union

import yaml

from gpt2repro.errors import Parser, UserError, first_line
from gpt2repro.files import is_special
from gpt2repro.recipe import Recipe
from gpt2repro.run_folder import MODEL_FOLDER


# What a run's recipe.yaml records besides its recipe; `data` there describes the data.
RECORD_KEYS = ("base_model", "base_sha256", "hardware", "versions", "run_id", "overrides")
OTHER_NAMES = {  # what nanoGPT and transformers' Trainer call a field -> what it is called here
    "dropout": "model.resid_pdrop, model.embd_pdrop and model.attn_pdrop",
    "block_size": "sequence_length, and model.n_positions when training from scratch",
    "batch_size": "micro_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_tokens, from which the accumulation follows",
    "num_train_epochs": "max_steps",
    "max_iters": "max_steps",
    "lr": "learning_rate",
    "min_lr": "min_learning_rate",
    "warmup_iters": "warmup_steps",
    "lr_scheduler_type": "lr_schedule",
    "eval_interval": "validate_every",
    "eval_steps": "validate_every",
    "save_steps": "checkpoint_every",
    "logging_steps": "log_every",
    "grad_clip": "max_grad_norm",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "dataset": "data_dir",
    "out_dir": "output_dir",
    "model_name_or_path": "init_from",
    "early_stopping_patience": "patience",
}
PATH_FIELDS = ("output_dir", "data_dir", "init_from", "hellaswag_data")
CLOSE = 0.75  # difflib's similarity from which a name is suggested


def parse_recipe(argv: list[str], default_config: Path, config_class: type) -> tuple[Recipe, list[str]]:
    """The recipe of a command line, and the mistakes in the fields' names and types.

    Args:
        argv: `--config FILE`, and `--field value` or `--model.field value`, which override it. The file is a recipe, or
            the recipe.yaml of a run, whose record of data, hardware and software is left out.
        default_config: the recipe to use without --config.
        config_class: the model's configuration class; its annotated fields are those that `model` may set.
    Returns:
        The recipe, with the default in place of each invalid value; and one line per mistake: an unknown field with
        the nearest known name, or a value of the wrong type.
    Raises:
        UserError: the recipe file cannot be read.
    """
    types = field_types(config_class)
    namespace, unrecognized = build_parser(config_class).parse_known_args(argv)
    flags = {name: value for name, value in vars(namespace).items() if name != "config" and value is not None}
    content = recipe_of_record(read_yaml(Path(namespace.config or default_config).expanduser()))
    in_file, model_problems = flatten_model(content)

    problems = argument_problems(unrecognized, types) + model_problems
    if sets_data_twice(in_file) or sets_data_twice(flags):
        problems.append("data and data_dir are both given; list every directory in data, and remove data_dir")
    if "data_dir" in flags:
        in_file.pop("data", None)  # the flag replaces the file's mixture
    fields, value_problems = convert_fields(in_file | flags, types)
    expand_home(fields)
    if in_file.get("data") or flags.get("data"):
        fields["data_dir"] = ""  # a mixture does not read it, nor does one that is refused here
    return Recipe(**fields), problems + value_problems


def changed_fields(recipe: dict, recorded: dict) -> dict[str, tuple[Any, Any]]:
    """The fields in which a recorded recipe, as read from recipe.yaml, would train another model than `recipe`.

    Returns:
        The recorded value and that of `recipe`, by the field's name.
    """
    changed = {}
    for field in dataclasses.fields(Recipe):
        there, here = (values.get(field.name, default_of(field)) for values in (recorded, recipe))
        is_same = there == here or (field.name == "init_from" and plain_path(there) == plain_path(here))
        if not field.metadata["changeable"] and not is_same:
            changed[field.name] = (there, here)
    return changed


def plain_path(init_from: str) -> str:
    """One name for `runs/a`, `./runs/a/` and `runs/a/model`, which are the same model."""
    return os.path.normpath(init_from).removesuffix(f"/{MODEL_FOLDER}")


def differences(recipe: Recipe, recorded: dict) -> list[str]:
    """`changed_fields` for an error message."""
    changed = changed_fields(vars(recipe), recorded)
    return [f"{name}={there} there, {here} here" for name, (there, here) in changed.items()]


def default_of(field: dataclasses.Field) -> Any:
    """The default of a dataclass field, made by its factory if it has one."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def unknown_field(name: str, known: Iterable[str]) -> str:
    """The message about a field that does not exist, with the nearest one that does."""
    dashes = "--" if name.startswith("--") else ""
    plain = name.removeprefix("--").split("=")[0]
    in_model = f"{dashes}model.{plain}"
    nearest = difflib.get_close_matches(f"{dashes}{plain}", known, n=1, cutoff=CLOSE)
    here = OTHER_NAMES.get(plain.removeprefix("model."))
    if here:
        remedy = f"here it is {here}"
    elif in_model in known:
        remedy = f"did you mean {in_model}?"
    else:
        remedy = f"did you mean {nearest[0]}?" if nearest else "see --help"
    return f"unknown recipe field {name}; {remedy}"


# ---- flags ----


def field_types(config_class: type) -> dict[str, Any]:
    """The type of each field by name; those of the model's configuration are called `model.NAME`."""
    model_types = {f"model.{name}": hint for name, hint in config_class.__annotations__.items()}
    return typing.get_type_hints(Recipe) | model_types


def build_parser(config_class: type) -> argparse.ArgumentParser:
    """A flag for each field, in the groups of the recipe. All values stay text: they are converted as YAML's are."""
    types = field_types(config_class)
    parser = Parser("Train GPT-2. Flags override the recipe file; --model.FIELD flags set fields of the model.")
    parser.add_argument("--config", help="recipe file, one of recipes/ or your own")
    fields = dataclasses.fields(Recipe)
    titles = dict.fromkeys(field.metadata["group"] for field in fields)  # in order, each once
    groups = {title: parser.add_argument_group(title) for title in titles}
    for field in fields:
        add_flag(groups[field.metadata["group"]], field, types[field.name])
    for name, hint in types.items():
        if name.startswith("model."):
            default = getattr(config_class, name.removeprefix("model."))
            help = f"{describe(hint)} (default: {default})"
            groups["model"].add_argument(f"--{name}", help=help, **flag_settings(hint))
    return parser


def add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field, hint: Any) -> None:
    """Add the field's flag to its group of --help, or describe there a table that only the recipe file can set."""
    help = f"{field.metadata['help']} (default: {default_of(field)})"
    if field.name == "data":
        group.add_argument("--data", nargs="+", metavar="DIR=WEIGHT", help=help)
    elif is_table(hint):
        group.description = f"{field.name} (in the recipe file): {help}"
    else:
        group.add_argument(f"--{field.name}", help=help, **flag_settings(hint))


def flag_settings(hint: Any) -> dict[str, Any]:
    """The arguments of add_argument that follow from a field's type: a yes-or-no flag needs no value, a list takes
    several, and choices are shown."""
    if hint is bool:
        return {"nargs": "?", "const": "true", "metavar": "{true,false}"}
    if typing.get_origin(hint) is list:
        return {"nargs": "+", "metavar": "VALUE"}
    if typing.get_origin(hint) is Literal:
        return {"metavar": "{" + ",".join(typing.get_args(hint)) + "}"}
    return {"metavar": "VALUE"}


def argument_problems(unrecognized: list[str], types: dict[str, Any]) -> list[str]:
    """What is wrong with the words of the command line that no flag took."""
    known = [f"--{name}" for name in types]
    problems = [unknown_field(word, known) for word in unrecognized if word.startswith("-")]
    for previous, word in zip(["", *unrecognized], unrecognized):
        is_value_of_unknown_flag = previous.startswith("-") and "=" not in previous
        if not word.startswith("-") and not is_value_of_unknown_flag:
            is_recipe = word.endswith((".yaml", ".yml"))
            remedy = f"a recipe is given with --config {word}" if is_recipe else "flags are --field value"
            problems.append(f"unexpected argument {word!r}; {remedy}")
    return problems


# ---- the file ----


class RecipeLoader(yaml.SafeLoader):
    """YAML without what surprises in a recipe: a field given twice, of which the last would count; 010, which is 8;
    1:30, which is 90; and aliases, with which a few lines make gigabytes."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "write the value out", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        names = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in names:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is given twice", key.start_mark)
            names.add(name)
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node):
        if re.fullmatch(r"[-+]?(0[\d_]+|[\d_:]+:[\d_.:]+)", node.value):
            problem = f"{node.value} is read as {yaml.safe_load(node.value)}; write a decimal number"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        is_integer = node.tag == "tag:yaml.org,2002:int"
        return self.construct_yaml_int(node) if is_integer else self.construct_yaml_float(node)


for kind in ("int", "float"):
    RecipeLoader.add_constructor(f"tag:yaml.org,2002:{kind}", RecipeLoader.construct_decimal)


def read_yaml(path: Path) -> dict:
    if is_special(path):
        raise UserError(f"--config {path} is a pipe or device, which each process would read; save it to a file")
    try:
        content = yaml.load(path.read_text(), RecipeLoader) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--config {path} cannot be read ({first_line(error)}); recipes/ has the recipes that ship"
        ) from error
    except yaml.MarkedYAMLError as error:
        problem = " ".join(filter(None, (error.context, error.problem)))
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"--config {path}, line {line}: {problem}; correct the YAML") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path} is not valid YAML ({first_line(error)}); correct it") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must be a table of `field: value` lines")
    return content


def recipe_of_record(content: dict) -> dict:
    """The recipe in a run's recipe.yaml, from which the run can be repeated; a recipe file as it is."""
    recipe = {name: value for name, value in content.items() if name not in RECORD_KEYS}
    data = content.get("data")
    if not isinstance(data, dict) or "manifest_sha256" not in data:
        return recipe
    recipe.pop("data")
    if "sources" in data:  # a mixture
        recipe.pop("data_dir", None)
        recipe["data"] = {source["directory"]: source["weight"] for source in data["sources"]}
    return recipe


def flatten_model(values: dict) -> tuple[dict, list[str]]:
    """`model: {n_layer: 6}` as `model.n_layer: 6`, like the flags; and a line if `model` is not a table."""
    flat = {name: value for name, value in values.items() if name != "model"}
    model = values.get("model") or {}
    if not isinstance(model, dict):
        return flat, [f"model={model!r} is not a table of the model's fields"]
    flat.update({f"model.{name}": value for name, value in model.items()})
    return flat, []


def sets_data_twice(values: dict) -> bool:
    return bool(values.get("data")) and "data_dir" in values


# ---- values ----


def convert_fields(values: dict, types: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The arguments of Recipe, with each value converted to its field's type; and a line for each that cannot be."""
    fields: dict[str, Any] = {"model": {}}
    problems = []
    for key, value in values.items():
        name = str(key)
        if name not in types:
            problems.append(unknown_field(name, types))
            continue
        try:
            converted = convert(value, types[name])
        except (AttributeError, TypeError, ValueError, OverflowError):
            is_flag_of_table = name == "data" and isinstance(value, list)
            kind = "a list of DIR=WEIGHT" if is_flag_of_table else describe(types[name])
            problems.append(f"{name}={value!r} is not {kind}")
            continue
        if name.startswith("model."):
            fields["model"][name.removeprefix("model.")] = converted
        else:
            fields[name] = converted
    return fields, problems


def expand_home(fields: dict[str, Any]) -> None:
    """Expand the `~` of paths, which no shell does in a recipe file or in --output_dir=~/runs."""
    for name in PATH_FIELDS:
        if fields.get(name):
            fields[name] = os.path.expanduser(fields[name])
    if fields.get("data"):
        fields["data"] = {os.path.expanduser(directory): weight for directory, weight in fields["data"].items()}


def convert(value: Any, hint: Any) -> Any:
    """The value as the field's type. Flags are always text, and YAML 1.1 reads even 6e-4 as text.

    Raises:
        AttributeError, TypeError, ValueError or OverflowError: the value is not of that type.
    """
    choices = typing.get_args(hint)  # of a union, a list or a Literal
    if is_union(hint):
        if NoneType in choices and str(value).lower() in ("none", "null"):
            return None
        words = typing.get_args(choices[-1])  # of a Literal, e.g. auto
        return value if value in words else convert(value, choices[0])
    if typing.get_origin(hint) is list:
        items = value if isinstance(value, list) else [value]
        return [convert(item, choices[0]) for item in items]
    if typing.get_origin(hint) is Literal:
        if value not in choices:
            raise ValueError(value)
        return value
    if is_table(hint):
        return table_of_numbers(value)
    if hint is bool:
        return boolean(value)
    if value is None or isinstance(value, bool | dict | list):
        raise TypeError(value)
    return str(value) if hint is str else finite_number(value, hint)


def is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (UnionType, Union)


def is_table(hint: Any) -> bool:
    return typing.get_origin(hint) is dict


def boolean(value: Any) -> bool:
    """True of true, False of false, as YAML or a flag has them.

    Raises:
        ValueError: it is neither.
    """
    text = str(value).lower()
    if text not in ("true", "false"):
        raise ValueError(value)
    return text == "true"


def table_of_numbers(value: Any) -> dict[str, float]:
    """{name: number} of a YAML table, or of the NAME=NUMBER words of a flag.

    Raises:
        AttributeError, TypeError or ValueError: it is neither, or a name appears twice.
    """
    if isinstance(value, list):
        pairs = [word.rsplit("=", 1) for word in value]
        value = dict(pairs)
        if len(value) < len(pairs):
            raise ValueError(pairs)
    return {str(name): float(number) for name, number in value.items()}


def finite_number(value: Any, kind: type) -> int | float:
    """The value as an int or a float, whichever `kind` is; 1e3 is a whole number, too.

    Raises:
        TypeError, ValueError or OverflowError: it is not one.
    """
    number = float(value)
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        raise ValueError(value)
    return kind(number)


def describe(hint: Any) -> str:
    """What a value of this type is called in an error message."""
    parts = typing.get_args(hint)
    if is_union(hint):
        return " or ".join(describe(part) for part in parts)
    if typing.get_origin(hint) is Literal:
        return parts[0] if len(parts) == 1 else "one of " + ", ".join(parts)
    if typing.get_origin(hint) is list:
        return f"a list of {describe(parts[0])}"
    names = {
        int: "a whole number",
        float: "a finite number",
        bool: "true or false",
        str: "text",
        NoneType: "none",
        dict[str, float]: "a table of name: number",
    }
    return names[hint]
