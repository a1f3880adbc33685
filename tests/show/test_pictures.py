"""The pictures of runs: what is on them."""

import pytest
from matplotlib.figure import Figure

from gpt2repro.data.manifest import corpus_title
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
