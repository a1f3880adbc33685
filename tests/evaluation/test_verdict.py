"""The verdict on a run, by rows that are written out here."""

import dataclasses
import importlib.util
import math

import numpy as np
import pytest
import yaml
from logged_runs import FINEWEB, STEP, fineweb_record, record_of, rows_like
from support import ROOT

from gpt2repro.errors import UserError
from gpt2repro.evaluation import reference_curves
from gpt2repro.evaluation.reference_curves import (
    ReferenceCurve,
    curve_names,
    hellaswag_levels,
    load_curve,
    openai_levels,
    reference_problems,
)
from gpt2repro.evaluation.verdict import judge
from gpt2repro.recipe import Recipe
from modeling_gpt2repro import GPT2ReproConfig


LLMC = "llmc-124m-fineweb"


@pytest.fixture(scope="module")
def llmc() -> ReferenceCurve:
    return load_curve(LLMC)


# ---- the verdict ----


def test_a_run_that_follows_llmc_is_on_track(llmc):
    verdict = judge(fineweb_record(), rows_like(llmc))
    assert verdict.status == "on track" and {at.status for at in verdict.validations} == {"on track"}
    assert len(verdict.validations) == 79 and verdict.validations[-1].step == 19_560
    assert verdict.headline.startswith("on track: validation loss 3.2722 after 10,255,073,280 tokens (llm.c's ")
    assert "0.15 below OpenAI gpt2 (124M) on the same data (3.425)" in verdict.headline
    assert verdict.remark(19_560) == ", reference 3.2722 at as many tokens: on track"
    assert verdict.remark(19_810) == "", "its row could not be written"


def test_a_run_that_ends_005_above_llmc_is_off(llmc):
    verdict = judge(fineweb_record(), rows_like(llmc, above=0.05))
    since = verdict.off_since
    assert verdict.status == "off" and 250 < since <= 2000, "early runs differ by more"
    compared = "off: validation loss 3.3222 after 10,255,073,280 tokens is 0.05 above the reference since step "
    assert verdict.headline.startswith(f"{compared}{since:,} (llm.c's ") and "; usual causes: " in verdict.headline
    assert verdict.remark(19_560) == f", reference 3.2722 at as many tokens: 0.05 above it since step {since:,}"


def test_the_causes_are_named_once_and_are_the_runs_own_settings(llmc):
    record = fineweb_record(learning_rate=6e-3, sampling="sequential", model={"attn_pdrop": 0.1})
    rows = rows_like(llmc, above=0.3)
    causes = "this run has learning_rate=0.006 (there 0.0006), model.attn_pdrop=0.1 (there 0.0)"
    assert causes in judge(record, rows).headline, "the reference's own sampling is not known"
    told = [judge(record, rows[:count]).remark(250 * count) for count in range(1, 6)]
    assert [causes in line for line in told] == [True, False, False, False, False]


def test_a_loss_that_is_no_number_is_off(llmc):
    rows = rows_like(llmc)
    verdict = judge(fineweb_record(), [*rows[:-1], rows[-1] | {"val_loss": math.nan}])
    assert verdict.status == "off" and verdict.headline.startswith("off: validation loss nan after ")


def test_a_loss_below_the_tolerance_is_better(llmc):
    verdict = judge(fineweb_record(), rows_like(llmc, above=-0.1))
    assert verdict.status == "better" and "0.1 below the reference" in verdict.headline


def test_a_run_is_off_only_as_long_as_it_is(llmc):
    rows = rows_like(llmc)
    rows[40]["val_loss"] += 0.2
    rows[-1]["val_loss"] += 0.2
    verdict = judge(fineweb_record(), rows)
    assert [at.step for at in verdict.validations if at.status == "off"] == [rows[40]["step"], 19_560]
    assert verdict.off_since == 19_560


def test_runs_are_compared_by_tokens(llmc):
    """Half the batch, twice the steps."""
    record = fineweb_record(global_batch_tokens=STEP // 2, max_steps=2 * 19_560)
    verdict = judge(record, rows_like(llmc, tokens_per_step=STEP // 2))
    assert verdict.status == "on track" and verdict.validations[-1].step == 2 * 19_560


@pytest.mark.parametrize(
    "max_steps, above, status",
    [
        (10_000, -0.1, "on track"),  # its learning rate has fallen by then
        (10_000, 0.05, "off"),
        (40_000, 0.05, "no verdict"),  # its learning rate is still high
        (40_000, 0.0, "on track"),
        (40_000, -0.1, "better"),
    ],
)
def test_what_is_expected_of_a_shorter_and_of_a_longer_schedule(llmc, max_steps, above, status):
    rows = rows_like(llmc, above, until=9000 * STEP)
    assert judge(fineweb_record(max_steps=max_steps), rows).status == status


@pytest.mark.parametrize("lr_schedule", ["wsd", "constant"])
def test_before_its_end_a_learning_rate_that_stays_at_its_peak_explains_a_loss_above(llmc, lr_schedule):
    record = fineweb_record(lr_schedule=lr_schedule)
    rows = rows_like(llmc, above=0.05)
    assert judge(record, rows[:-1]).status == "no verdict"
    assert "0.05 above the reference" in judge(record, rows[:-1]).headline
    verdict = judge(record, rows)
    assert verdict.status == "off" and f"lr_schedule={lr_schedule} (there cosine)" in verdict.headline
    assert judge(record, rows_like(llmc)).status == "on track"
    shorter = fineweb_record(lr_schedule=lr_schedule, max_steps=10_000)
    assert judge(shorter, rows_like(llmc, above=-0.1, until=10_000 * STEP)).status == "on track"


def test_openais_level_stands_beside_the_loss_of_what_is_exported(llmc):
    rows = [{"step": step, "tokens": step * STEP, "val_loss": loss} for step, loss in ((500, 3.3), (1000, 3.5))]
    for patience, expected in ((0, "0.075 above"), (1, "0.12 below")):
        verdict = judge(fineweb_record(reference_curve=None, patience=patience), rows)
        assert verdict.headline.startswith(f"{expected} OpenAI gpt2 (124M)")


def test_a_longer_run_must_not_end_above_the_reference(llmc):
    record = fineweb_record(max_steps=40_000)
    end = judge(record, [{"step": 40_000, "tokens": 40_000 * STEP, "val_loss": 3.3}])
    assert end.remark(40_000).startswith(", reference 3.2722 at its end: 0.028 above it")
    for loss, step, status in ((3.2, 40_000, "better"), (3.3, 40_000, "off"), (3.3, 30_000, "no verdict")):
        verdict = judge(record, [{"step": step, "tokens": step * STEP, "val_loss": loss}])
        assert verdict.status == status


def test_before_the_reference_begins_there_is_no_verdict_yet():
    assert judge(fineweb_record(), []).headline == "no verdict yet: the run has not been validated"
    verdict = judge(fineweb_record(), [{"step": 100, "tokens": 100 * STEP, "val_loss": 6.5}])
    assert verdict.status == "no verdict" and verdict.remark(100) == ""
    assert "begins at 131,072,000;" in verdict.headline


@pytest.mark.parametrize(
    "change, mismatch",
    [
        (
            {"data": FINEWEB | {"tokenizer": {"name": "bpe:50257", "vocab_size": 50257}}},
            "tokenizer bpe:50257 (there gpt2)",
        ),
        (
            {"data": FINEWEB | {"corpus": {"name": "/home/ada/fineweb"}}},
            "corpus fineweb (there HuggingFaceFW/fineweb, ",
        ),
        ({"data": FINEWEB | {"corpus": {"name": "50% a + 50% b"}}}, "corpus 50% a + 50% b (there "),
        ({"model": {"n_layer": 24, "n_embd": 1024}}, "layers 24 (there 12); width 1,024 (there 768)"),
        ({"sequence_length": 512}, "sequence length 512 (there 1,024)"),
        ({"validation_tokens": 1_048_576}, "validation tokens 1,048,576 (there 10,485,760)"),
        ({"validation_tokens": 0}, "validation tokens 100,000,000 (there 10,485,760)"),
        ({"init_from": "gpt2"}, "init from gpt2 (there scratch)"),
    ],
)
def test_what_cannot_be_compared_gets_no_verdict_but_the_reason(llmc, change, mismatch):
    verdict = judge(fineweb_record() | change, rows_like(llmc, above=0.5))
    assert (
        verdict.status == "no verdict"
        and not verdict.validations
        and verdict.curve is None
        and verdict.remark(19_560) == ""
    )
    assert mismatch in verdict.headline and "/home" not in verdict.headline


@pytest.mark.parametrize(
    "preparation, mismatch, caveat",
    [
        ({"deduplicated": True}, "deduplicated yes (there no)", "here the corpus is deduplicated"),
        (
            {"validation": "chosen by hash"},
            "validation chosen by hash (there the first documents)",
            "here the validation documents are chosen by hash",
        ),
    ],
)
def test_other_validation_documents_are_not_comparable_even_if_as_many(llmc, preparation, mismatch, caveat):
    verdict = judge(fineweb_record() | {"data": FINEWEB | preparation}, rows_like(llmc, above=0.5))
    assert verdict.status == "no verdict" and mismatch in verdict.headline
    assert f"OpenAI gpt2 (124M) on the same corpus (3.425, {caveat})" in verdict.headline


def test_llmcs_own_token_files_are_the_references_data(llmc):
    data = FINEWEB | {"corpus": {"name": "fineweb10B (llm.c's tokens)"}}
    assert judge(fineweb_record() | {"data": data}, rows_like(llmc)).status == "on track"


def test_without_a_reference_there_is_nothing_to_say_but_openais_level(llmc):
    elsewhere = fineweb_record(reference_curve=None) | {"data": FINEWEB | {"corpus": {"name": "mine"}}}
    assert judge(elsewhere, rows_like(llmc)).headline == ""
    assert judge(fineweb_record(reference_curve=None), rows_like(llmc)).headline == (
        "0.15 below OpenAI gpt2 (124M) on the same data (3.425)"
    )
    fewer = fineweb_record(reference_curve=None, validation_tokens=1_048_576)
    assert judge(fewer, rows_like(llmc)).headline == (
        "0.15 below OpenAI gpt2 (124M) on the same corpus (3.425, on the first 10,485,760 tokens)"
    )
    old = {key: value for key, value in fineweb_record().items() if key != "reference_curve"}
    assert judge(old, rows_like(llmc)).status == "no verdict", "of a run that is older than the field"


# ---- curves ----


def test_llmcs_curve_is_the_published_one(llmc, shared):
    lines = (shared / "llmc_gpt2_124m_fineweb10b_val.csv").read_text().splitlines()[2:]  # without step 0
    published = [(int(tokens), float(loss)) for _, tokens, loss in (line.split(",") for line in lines)]
    assert list(zip(llmc.tokens, llmc.losses)) == published


def test_between_two_points_losses_are_linear_in_the_logarithm_of_tokens(llmc):
    curve = dataclasses.replace(llmc, tokens=(100, 400), losses=(6.0, 4.0))
    assert curve.loss_at(200) == pytest.approx(5.0)
    assert (curve.loss_at(100), curve.loss_at(400)) == pytest.approx((6.0, 4.0))
    assert [curve.covers(tokens) for tokens in (0, 99, 100, 400, 401)] == [False, False, True, True, False]


def test_the_logarithm_predicts_llmcs_left_out_points_better_than_tokens_do(llmc):
    """Every other point, from its neighbours."""

    def error(scale) -> float:
        errors = []
        for left in range(4, len(llmc.tokens) - 2, 2):
            a, middle, b = (scale(tokens) for tokens in llmc.tokens[left : left + 3])
            share = (middle - a) / (b - a)
            predicted = llmc.losses[left] * (1 - share) + llmc.losses[left + 2] * share
            errors.append(abs(predicted - llmc.losses[left + 1]))
        return sum(errors) / len(errors)

    assert error(math.log) < error(float)


def test_the_tolerance_adds_both_causes(llmc):
    spread = {"runs": 4, "sigma": 0.3, "progress": 0.2}
    curve = dataclasses.replace(llmc, tokens=(100, 100 * math.e), losses=(6.0, 4.0), spread=spread)
    assert curve.deviation(100) == pytest.approx(0.5)  # hypot(0.3, 0.2 * 2)
    assert curve.tolerance(100) == pytest.approx(4 * 0.5 * math.sqrt(1.25))


@pytest.mark.parametrize("name", curve_names())
def test_every_curve_is_whole_and_its_settings_are_fields(name):
    curve = load_curve(name)
    assert list(curve.tokens) == sorted(set(curve.tokens)) and curve.tokens[0] > 0
    assert all(later < earlier + 0.05 for earlier, later in zip(curve.losses, curve.losses[1:]))
    assert curve.conditions.keys() <= reference_curves.CONDITIONS.keys()
    fields = {field.name for field in dataclasses.fields(Recipe)} | {
        f"model.{name}" for name in GPT2ReproConfig.__annotations__
    }
    assert curve.settings.keys() <= fields
    assert curve.source and curve.measured and curve.spread["runs"] >= 1


def test_the_recipes_name_curves_that_exist_and_have_their_settings():
    named = {}
    for path in (ROOT / "recipes").glob("*.yaml"):
        named[path.stem] = yaml.safe_load(path.read_text()).get("reference_curve")
        assert reference_problems(named[path.stem]) == []
    assert named["gpt2-124m-fineweb"] == LLMC
    assert load_curve(LLMC).differences(fineweb_record()) == []


def test_an_unknown_curve_is_one_line_with_the_nearest_name():
    (problem,) = reference_problems("llmc-124m-finweb")
    assert problem == f"reference_curve=llmc-124m-finweb does not exist; did you mean {LLMC}?"
    assert "use one of " in reference_problems("x")[0]
    with pytest.raises(UserError, match="reference_curve=openai does not exist"):
        load_curve("openai")


def test_a_run_from_elsewhere_may_name_a_curve_that_is_not_here(llmc):
    verdict = judge(fineweb_record(reference_curve="theirs"), rows_like(llmc))
    assert verdict.status == "no verdict" and verdict.curve is None
    assert verdict.headline.startswith("no verdict: reference_curve=theirs does not exist; use one of demo, ")


def test_the_spread_between_runs_is_recovered(llmc):
    """benchmarks/reference_curve.py, on many runs of a known spread."""
    path = ROOT / "benchmarks" / "reference_curve.py"
    spec = importlib.util.spec_from_file_location("reference_curve_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    slopes = np.array([llmc.slope_at(tokens) for tokens in llmc.tokens])
    noise = np.random.default_rng(0).normal(size=(200, len(slopes)))
    losses = llmc.losses + np.hypot(0.003, 0.02 * slopes) * noise
    sigma, progress = benchmark.fit_spread(losses.var(axis=0, ddof=1), slopes)
    assert sigma == pytest.approx(0.003, rel=0.1) and progress == pytest.approx(0.02, rel=0.1)


# ---- levels ----


def test_openais_levels_are_those_of_the_same_data_and_size():
    openwebtext = FINEWEB | {"corpus": {"name": "x", "hub_id": "Skylion007/openwebtext", "revision": "0a1"}}
    same_size = record_of("gpt2-124m-openwebtext", openwebtext)
    [level] = openai_levels(same_size)
    assert (level.name, level.loss) == ("OpenAI gpt2 (124M)", 3.12)
    assert level.caveat == "another held-out part, random windows"
    assert [level.caveat for level in openai_levels(fineweb_record())] == [None]
    other_size = same_size | {"model": {"n_layer": 6}}
    assert [level.loss for level in openai_levels(other_size)] == [3.12, 2.84, 2.67, 2.54]
    assert openai_levels(same_size | {"data": openwebtext | {"tokenizer": {"name": "char"}}}) == []


def test_hellaswag_levels_are_of_the_same_size_and_of_all_items():
    assert hellaswag_levels(fineweb_record(), 10_042) == {"GPT-2 (124M)": 0.2955, "GPT-3 (124M)": 0.337}
    assert hellaswag_levels(fineweb_record(), 1000) == {}
