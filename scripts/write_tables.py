"""Write the tables of the documentation that follow from the code: what the planner says, and the recipe's fields.

    python scripts/write_tables.py

A table stands in its page between `<!-- table: NAME -->` and `<!-- end -->`. tests/test_docs.py fails if a page does
not have what the code says today.
"""

import dataclasses
import re
import typing
from types import NoneType, UnionType
from typing import Any

import yaml

from gpt2repro import planner
from gpt2repro.errors import Parser, run_script
from gpt2repro.evaluation.reference_curves import load_curve
from gpt2repro.files import CHECKOUT
from gpt2repro.model_fields import model_defaults, model_fields
from gpt2repro.plan.cost import bill, step_time
from gpt2repro.plan.hardware import devices
from gpt2repro.plan.memory import Setup, capacity, peak_memory
from gpt2repro.plan.sizes import Sizes
from gpt2repro.recipe import Recipe
from gpt2repro.recipe_file import default_of


DOCS = CHECKOUT / "docs"
MIB = 2**20
SIZES = {"124M": "gpt2-124m-fineweb", "355M": "gpt2-medium-fineweb", "774M": "gpt2-large-fineweb"}
SIZES |= {"1558M": "gpt2-xl-fineweb-edu"}
BOUND_SIGNS = {"at_least": "≥", "above": ">", "at_most": "≤", "below": "<"}


def main(argv: list[str]) -> None:
    Parser(__doc__).parse_args(argv)
    for page in sorted(DOCS.glob("*.md")):
        old = page.read_text()
        new = with_tables(old)
        if new != old:
            page.write_text(new)
            print(page.relative_to(CHECKOUT))


def with_tables(page: str) -> str:
    """The text of a page with each of its tables made anew."""

    def written(match: re.Match) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table: ([\w-]+) -->)\n.*?(<!-- end -->)", written, page, flags=re.DOTALL)


def table(columns: str, rows: list[list[str]]) -> str:
    """A Markdown table. A column whose title ends with a colon is aligned to the right."""
    titles = columns.split(" | ")
    rules = ["---:" if title.endswith(":") else "---" for title in titles]
    lines = [[title.removesuffix(":") for title in titles], rules, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


# ---- what the planner says ----


class Plan(typing.NamedTuple):
    """What the planner proposes: the recipe, the model, the setup that fits or None, and its bytes at the peak."""

    recipe: Recipe
    sizes: Sizes
    setup: Setup | None
    mib: float
    milliseconds: float
    hours: float
    tokens_per_second: float
    mfu: str


def plan(name: str, *flags: str) -> Plan:
    """What `python -m gpt2repro.planner recipes/NAME.yaml FLAGS` proposes."""
    args, recipe = planner.parse_arguments([str(CHECKOUT / "recipes" / f"{name}.yaml"), *flags])
    sizes, device = planner.model_sizes(recipe), planner.known_device(args, recipe)
    asked = planner.setup_of(recipe, args, args.strategy)
    sequences = planner.sequences_per_gpu(recipe, args.num_gpus)
    setup = planner.proposal(sizes, asked, sequences, capacity(device.memory_mib))
    if setup is None:
        return Plan(recipe, sizes, None, 0, 0, 0, 0, "")
    step = step_time(sizes, setup, device, args.gpus_per_machine, args.network_gbit)
    validations = recipe.max_steps // recipe.validate_every + 1
    hours = bill(step, recipe.max_steps, validations * recipe.validation_tokens, args.num_gpus, device, None).hours
    known = "" if "mfu" in yaml_of_devices()[args.gpu] else " (assumed)"
    mfu = f"{device.mfu:.0%}{known}"
    mib = peak_memory(sizes, setup).total / MIB
    return Plan(recipe, sizes, setup, mib, step.seconds * 1000, hours, step.tokens_per_second, mfu)


def yaml_of_devices() -> dict[str, dict]:
    return yaml.safe_load((CHECKOUT / "gpt2repro" / "plan" / "hardware.yaml").read_text())


def fits(setup: Setup | None) -> str:
    if setup is None:
        return "no"
    return planner.fit_text(setup) + (", recomputing" if setup.gradient_checkpointing else "")


def one_gpu() -> str:
    rows = []
    for gpu in planner.PLANNED:
        found = plan(SIZES["124M"], "--gpu", gpu)
        gib = f"{devices()[gpu].memory_mib / 1024:.0f}"
        speed, hours = f"{found.tokens_per_second / 1000:,.0f}k", f"{found.hours:,.1f}"
        rows.append([f"`{gpu}`", gib, fits(found.setup), f"{found.mib:,.0f}", found.mfu, speed, hours])
    return table("`--gpu` | GiB: | micro-batch x accumulation | peak, MiB: | MFU: | tokens/s: | hours:", rows)


def what_fits() -> str:
    rows = []
    for gpu in planner.PLANNED:
        gib = f"{devices()[gpu].memory_mib / 1024:.0f}"
        rows.append([f"`{gpu}`", gib, *(fits(plan(name, "--gpu", gpu).setup) for name in SIZES.values())])
    return table(f"`--gpu` | GiB: | {' | '.join(SIZES)}", rows)


def eight_gpus() -> str:
    rows = []
    for gpu in ("h200", "h100", "a100", "a100-40", "l40s", "rtx4090"):
        cells = []
        for name in SIZES.values():
            ways = {way: plan(name, "--gpu", gpu, "--num_gpus", "8", "--strategy", way) for way in ("ddp", "fsdp2")}
            way = "ddp" if ways["ddp"].setup else "fsdp2"
            best = ways[way]
            cells.append(f"{way} {fits(best.setup)}: {best.hours:,.1f} h" if best.setup else "no")
        rows.append([f"8 x `{gpu}`", *cells])
    tokens = {name: plan(name).recipe for name in SIZES.values()}
    rows.append(["tokens", *(f"{recipe.tokens_before(recipe.max_steps) / 1e9:.1f}B" for recipe in tokens.values())])
    return table(f"machine | {' | '.join(SIZES)}", rows)


def the_bill() -> str:
    rows = []
    for title, gpu, count, price in (
        ("8 x H100", "h100", 8, 20.0),
        ("8 x A100 80 GB", "a100", 8, 14.0),
        ("1 x H100", "h100", 1, 2.5),
        ("1 x RTX 4090", "rtx4090", 1, None),
    ):
        found = plan(SIZES["124M"], "--gpu", gpu, "--num_gpus", str(count))
        dollars = ["your own", ""] if price is None else [f"${price:g}", f"{found.hours * price:,.0f}"]
        kwh = f"{found.hours * count * devices()[gpu].watts / 1000:,.1f}"
        rows.append([title, f"{found.hours:,.1f}", kwh, *dollars, found.mfu])
    return table("machine | hours: | kWh of the GPUs: | at an hourly price of: | dollars: | share of the peak:", rows)


def hour_by_hour() -> str:
    """llm.c's validation losses at fractions of its run, and when each machine is there."""
    name = "gpt2-124m-fineweb"
    machines = {"8 x H100": ("h100", "8"), "8 x A100": ("a100", "8"), "1 x H100": ("h100", "1")}
    machines |= {"1 x RTX 4090": ("rtx4090", "1")}
    plans = {title: plan(name, "--gpu", gpu, "--num_gpus", count) for title, (gpu, count) in machines.items()}
    recipe = plans["8 x H100"].recipe
    curve = load_curve("llmc-124m-fineweb")
    rows = []
    for step in (250, 500, 750, 1000, 2000, 3000, 5000, 7500, 10_000, 12_500, 15_000, 17_500, recipe.max_steps):
        tokens = recipe.tokens_before(step)
        loss = curve.loss_at(tokens)
        clocks = [clock(found.hours * step / recipe.max_steps) for found in plans.values()]
        rows.append([f"{step:,}", f"{tokens / 1e9:.2f}", f"{loss:.2f}", *clocks])
    return table(f"step: | tokens, billions: | validation loss: | {': | '.join(machines)}:", rows)


def clock(hours: float) -> str:
    minutes = round(hours * 60)
    return f"{minutes // 60}:{minutes % 60:02d}"


# ---- the recipe ----


def recipe_fields() -> str:
    hints = typing.get_type_hints(Recipe)
    parts = []
    groups = dict.fromkeys(field.metadata["group"] for field in dataclasses.fields(Recipe))
    for group in groups:
        fields = [field for field in dataclasses.fields(Recipe) if field.metadata["group"] == group]
        rows = [[f"`{f.name}`", type_text(hints[f.name]), value_text(default_of(f)), meaning(f)] for f in fields]
        parts.append(f"## {group[0].upper()}{group[1:]}\n\n{table('field | type | default | meaning', rows)}")
    return "\n".join(parts)


def meaning(field: dataclasses.Field) -> str:
    bounds = ", ".join(f"{BOUND_SIGNS[sign]} {value}" for sign, value in field.metadata["bounds"].items())
    marks = [mark for mark in ("changeable", "overridable") if field.metadata[mark]]
    notes = "; ".join(filter(None, [bounds, *marks]))
    return cell(field.metadata["help"]) + (f" *({notes})*" if notes else "")


def model_table() -> str:
    defaults, hints = model_defaults(), model_fields().__annotations__
    rows = [[f"`model.{name}`", type_text(hints[name]), value_text(defaults[name])] for name in defaults]
    return table("field | type | default", rows)


def type_text(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return " or ".join("none" if kind is NoneType else type_text(kind) for kind in typing.get_args(hint))
    return f"`{hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else hint}`"


def value_text(value: Any) -> str:
    return "none" if value is None else f"`{cell(yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0])}`"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


TABLES = {
    "one-gpu": one_gpu,
    "what-fits": what_fits,
    "eight-gpus": eight_gpus,
    "bill": the_bill,
    "hour-by-hour": hour_by_hour,
    "recipe-fields": recipe_fields,
    "model-fields": model_table,
}


if __name__ == "__main__":
    run_script(main)
