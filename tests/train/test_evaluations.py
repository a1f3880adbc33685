"""What a run says and draws at a validation."""

from types import SimpleNamespace

import pytest
from logged_runs import FINEWEB, STEP

from gpt2repro.evaluation.reference_curves import load_curve
from gpt2repro.evaluation.verdict import GUIDE
from gpt2repro.recipe import Recipe
from gpt2repro.run_folder import RunFolder
from gpt2repro.train import evaluations
from gpt2repro.train.evaluations import Evaluations
from gpt2repro.train.metrics import Metrics


class Telemetry:
    """Logs rows as the real one does, and keeps what is said."""

    def __init__(self, folder: RunFolder):
        self.metrics, self.said = Metrics(folder.metrics), []

    def log(self, step: int, **values) -> None:
        self.metrics.add({"step": step, "tokens": step * STEP, **values})
        self.metrics.write()

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """The evaluations of a 124M run that compares itself with llm.c's, whose losses are llm.c's and some more."""
    curve = load_curve("llmc-124m-fineweb")

    def make(above=0.0, corpus=FINEWEB["corpus"], is_main_process=True) -> Evaluations:
        recipe = Recipe(
            output_dir=str(tmp_path), validation_tokens=10_485_760, reference_curve=curve.name, max_steps=19_560
        )
        data = SimpleNamespace(name="fineweb", val=None, record=lambda: FINEWEB | {"corpus": corpus})
        plan = SimpleNamespace(recipe=recipe, tokenizer=None, data=data)
        accelerator = SimpleNamespace(is_main_process=is_main_process)
        return Evaluations(plan, [], accelerator, None, None, Telemetry(RunFolder(tmp_path)))

    def validate(run: Evaluations, step: int, above: float) -> list[str]:
        loss = curve.loss_at(step * STEP) + above
        monkeypatch.setattr(evaluations, "validation_losses", lambda *args: {"val_loss": loss})
        is_last_step = step == run.recipe.max_steps
        run.validate(SimpleNamespace(step=step, is_last_step=is_last_step, note_validation=lambda val_loss: None))
        return run.telemetry.said

    make.validate = validate
    return make


def test_each_validation_stands_beside_the_reference(run_of):
    run = run_of()
    run_of.validate(run, 5000, above=0.0)
    run_of.validate(run, 5250, above=0.31)
    on_track, goes_off, is_off = run_of.validate(run, 5500, above=0.31)
    assert on_track == "step 5,000: validation loss 3.5535, reference 3.5535 at as many tokens: on track"
    off = "reference 3.5404 at as many tokens: 0.31 above it since step 5,250"
    causes = "this run has min_learning_rate=6e-05 (there 0.0), warmup_steps=715 (there 700)"
    assert goes_off == f"step 5,250: validation loss 3.8504, {off}; {causes}; {GUIDE} tells causes apart"
    assert is_off == f"step 5,500: validation loss 3.8398, {off.replace('3.5404', '3.5298')}"


def test_the_picture_exists_while_the_run_trains_and_costs_a_bounded_share_of_the_time(run_of, monkeypatch):
    drawn = []
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(evaluations.time, "perf_counter", lambda: clock.now)

    def draw(runs) -> bytes:
        drawn.append(runs[0].rows[-1]["step"])
        clock.now += 1.0
        return b"a picture"

    monkeypatch.setattr(evaluations, "loss_picture", draw)
    run = run_of()
    for step, after in ((5000, 0), (5250, 49), (5500, 2), (5750, 100), (run.recipe.max_steps, 100)):
        clock.now += after
        run_of.validate(run, step, above=0.0)
    # drawing took 1 second, so the next may begin 1 / 0.02 seconds later; the end of the run draws after the last step
    assert drawn == [5000, 5500, 5750]
    assert run.folder.picture.read_bytes() == b"a picture"


def test_a_picture_that_cannot_be_drawn_ends_neither_the_run_nor_its_verdict(run_of, monkeypatch):
    monkeypatch.setattr(evaluations, "loss_picture", lambda runs: 1 / 0)
    run = run_of()
    (said,) = run_of.validate(run, 5000, above=0.0)
    failure = f"{run.folder.picture} could not be drawn (division by zero)"
    assert said == f"step 5,000: validation loss 3.5535, reference 3.5535 at as many tokens: on track; {failure}"


def test_other_processes_neither_speak_nor_draw(run_of):
    run = run_of(is_main_process=False)
    assert run_of.validate(run, 5000, above=0.0) == [] and not run.folder.picture.exists()


def test_a_run_says_at_its_start_why_it_will_not_be_compared(run_of):
    run = run_of(corpus={"name": "mine"})
    run.announce_reference()
    reason = "no verdict: the run is not comparable with reference_curve=llmc-124m-fineweb: corpus mine (there "
    assert run.telemetry.said[0].startswith(reason)
    run_of.validate(run, 5000, above=0.3)
    assert run.telemetry.said[1] == "step 5,000: validation loss 3.8535"

    comparable = run_of()
    comparable.announce_reference()
    assert comparable.telemetry.said == []
