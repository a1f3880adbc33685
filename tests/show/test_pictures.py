"""The pictures of runs: what is on them."""

import math

import pytest
from logged_runs import STEP, fineweb_record, rows_like
from matplotlib.figure import Figure

from gpt2repro.data.manifest import corpus_title
from gpt2repro.evaluation.reference_curves import load_curve
from gpt2repro.show.logged_run import LoggedRun
from gpt2repro.show.pictures import loss_picture, shortened, training_picture


RECORD = {
    "data": {
        "corpus": {"name": "text"},
        "tokenizer": {"name": "char", "vocab_size": 65},
        "splits": {"train": {"tokens": 9000}, "val": {"tokens": 1000}},
    }
}


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that were drawn, oldest first."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    return figures


def run_of(*rows: dict, name="a run", **record) -> LoggedRun:
    return LoggedRun(name, RECORD | record, [{"tokens": 100 * row["step"], **row} for row in rows])


def labels(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_picture_marks_the_exported_step_and_short_runs_begin_at_step_0(drawn):
    run = run_of({"step": 0, "val_loss": 2.3}, {"step": 4, "loss": 3.0}, {"step": 4, "val_loss": 2.5})
    loss_picture([run], exported=0)
    (axes,) = drawn[-1].axes
    assert labels(axes) == ["training", "validation, last 2.5000", "exported, step 0, 2.3000"]
    assert axes.get_xlim()[0] == 0


def test_a_run_that_has_only_begun_is_drawn():
    for row in ({"step": 0, "val_loss": 2.3}, {"step": 1, "loss": 3.0}, {"step": 1, "loss": None}):
        assert loss_picture([run_of(row)]).startswith(b"\x89PNG\r\n\x1a\n")
    assert training_picture([run_of(row)]).startswith(b"\x89PNG\r\n\x1a\n")


def test_losses_that_are_no_numbers_leave_gaps(drawn, llmc):
    rows = rows_like(llmc)
    broken = [row | {"val_loss": math.nan} for row in rows[:3]] + rows[3:] + [rows[-1] | {"val_loss": math.inf}]
    loss_picture([LoggedRun("a run", fineweb_record(), broken)])
    top, bottom = drawn[-1].axes[0].get_ylim(), drawn[-1].axes[1].get_ylim()
    assert all(map(math.isfinite, (*top, *bottom)))


def test_text_in_the_picture_is_literal(drawn):
    """Two dollar signs would begin and end a formula, which not every text is."""
    run = run_of({"step": 1, "loss": 3.0}, name=r"a $100 \run$ of $\frac{$", reference_losses={r"$\x_{$": 3.3})
    loss_picture([run])
    assert drawn[-1].get_suptitle() == r"a $100 \run$ of $\frac{$: GPT-2 on text"


@pytest.mark.parametrize(
    "corpus, title",
    [
        ({"name": "/home/ada/corpus", "hub_id": "/home/ada/corpus", "revision": None}, "corpus"),
        ({"name": "private/corpus"}, "corpus"),
        ({"name": "HuggingFaceFW/fineweb", "revision": "0a1"}, "HuggingFaceFW/fineweb"),
        ({"name": "70% web + 30% code"}, "70% web + 30% code"),
    ],
)
def test_a_title_holds_no_path_of_this_machine(corpus, title, drawn):
    assert corpus_title(corpus) == title
    loss_picture([run_of({"step": 1, "loss": 3.0}, data=RECORD["data"] | {"corpus": corpus})])
    assert drawn[-1].get_suptitle() == f"a run: GPT-2 on {title}"


@pytest.mark.parametrize(
    ("number", "text"), [(124_439_808, "124.4M"), (25_696, "25.7K"), (1_250_000, "1.25M"), (1e10, "10B"), (0, "0")]
)
def test_counts_are_shown_in_their_unit(number, text):
    assert shortened(number) == text


# ---- runs beside what is known ----


@pytest.fixture(scope="module")
def llmc():
    return load_curve("llmc-124m-fineweb")


def hellaswag_rows(items: int) -> list[dict]:
    score = {"hellaswag_acc_norm": 0.29, "hellaswag_acc_norm_stderr": 0.01, "hellaswag_items": items}
    return [{"step": 250 * n, "tokens": 250 * n * STEP, **score} for n in (1, 2)]


def test_the_reference_is_drawn_and_the_difference_from_it(drawn, llmc):
    rows = [{"step": 10, "tokens": 10 * STEP, "loss": 9.0}, *rows_like(llmc, above=0.05)]
    loss_picture([LoggedRun("a run", fineweb_record(), rows)])
    losses, differences = drawn[-1].axes
    assert labels(losses) == ["training", "validation, last 3.3222, off", f"{llmc.title}, last 3.2722"]
    _, (tokens, gaps) = [line.get_data() for line in differences.lines]
    assert tuple(tokens) == llmc.tokens and gaps == pytest.approx(0.05)
    (band,) = differences.collections
    assert band.get_datalim(differences.transData).y1 == pytest.approx(max(map(llmc.tolerance, llmc.tokens)))
    assert [text.get_text() for text in losses.texts] == ["OpenAI gpt2 (124M), 3.4250"]


def test_hellaswag_stands_beside_gpt2_and_gpt3_with_its_interval(drawn):
    for items, levels in (
        (10_042, ["chance, 25.0%", "GPT-2 (124M), 29.5%", "GPT-3 (124M), 33.7%"]),
        (100, ["chance, 25.0%"]),
    ):
        rows = [{"step": 1, "tokens": STEP, "loss": 9.0}, *hellaswag_rows(items)]
        loss_picture([LoggedRun("a run", fineweb_record(), rows)])
        axes = drawn[-1].axes[-1]
        assert [text.get_text() for text in axes.texts] == levels
        limits = axes.collections[0].get_datalim(axes.transData)
        assert (limits.y0, limits.y1) == pytest.approx((0.29 - 1.96 * 0.01, 0.29 + 1.96 * 0.01))


def test_hellaswag_of_a_single_item_has_no_interval(drawn):
    rows = [row | {"hellaswag_acc_norm_stderr": None} for row in hellaswag_rows(items=1)]
    loss_picture([LoggedRun("a run", fineweb_record(), rows)])
    assert drawn[-1].axes[-1].get_legend() is not None


def test_several_runs_have_their_names_and_colours_and_one_reference(drawn, llmc):
    good, bad = (LoggedRun(f"run {above}", fineweb_record(), rows_like(llmc, above)) for above in (0.0, 0.5))
    loss_picture([good, bad])
    names = ["run 0.0, last 3.2722, on track", "run 0.5, last 3.7722, off", f"{llmc.title}, last 3.2722"]
    assert labels(drawn[-1].axes[0]) == names and "thin: training" in drawn[-1].axes[0].get_ylabel()
    training_picture([good, bad])
    axes = drawn[-1].axes[0]
    assert labels(axes) == ["run 0.0", "run 0.5"] and len({line.get_color() for line in axes.lines}) == 2


def test_more_runs_than_colours_differ_in_their_lines(drawn, llmc):
    runs = [LoggedRun(f"run {number}", fineweb_record(), rows_like(llmc)) for number in range(9)]
    for draw in (loss_picture, training_picture):
        draw(runs)
        shown = drawn[-1].axes[0].get_legend().get_lines()[:9]
        assert len({(line.get_color(), line.get_linestyle()) for line in shown}) == 9


def test_every_name_fits_into_the_picture(drawn):
    """A legend would leave out what begins with an underscore; a name may have 255 characters."""
    runs = [run_of({"step": 1, "loss": 3.0}, {"step": 1, "val_loss": 3.0}, name=name) for name in ("_old", 250 * "n")]
    for draw in (loss_picture, training_picture):
        draw(runs)
        axes = drawn[-1].axes[0]
        frame = axes.get_legend().get_window_extent()
        assert len(labels(axes)) == 2 and frame.x0 > 0
    loss_picture(runs[1:])
    title = drawn[-1]._suptitle.get_window_extent()
    assert title.x0 > 0 and title.x1 < drawn[-1].bbox.x1


def test_the_first_losses_do_not_flatten_the_rest(drawn, llmc):
    rows = [{"step": 1, "tokens": STEP, "loss": 11.0}, *rows_like(llmc)]
    loss_picture([LoggedRun("a run", fineweb_record(), rows)])
    low, high = drawn[-1].axes[0].get_ylim()
    assert 3.0 < low < 3.2722 and 3.8 < high < 5.0
