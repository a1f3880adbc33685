"""What is evaluated during training: validation loss, HellaSwag, samples."""

import time

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from gpt2repro.errors import first_line
from gpt2repro.evaluation.hellaswag import EncodedItem, encode_item, score_encoded
from gpt2repro.evaluation.hellaswag_items import ENDINGS, load_items
from gpt2repro.evaluation.validation import validation_losses
from gpt2repro.evaluation.verdict import judge
from gpt2repro.files import write_bytes
from gpt2repro.models.sampling import encode_prompt, generate
from gpt2repro.processes import on_main
from gpt2repro.run_folder import RunFolder
from gpt2repro.show.logged_run import LoggedRun
from gpt2repro.show.pictures import loss_picture
from gpt2repro.train.checkpoint import Checkpoints
from gpt2repro.train.launch import run_settings
from gpt2repro.train.metrics import read_metrics
from gpt2repro.train.preflight import Plan
from gpt2repro.train.run_state import RunState
from gpt2repro.train.telemetry import Telemetry


DRAWING_SHARE = 0.02  # of the time, which pictures may take at most


class Evaluations:
    """The evaluations of a run. All ranks make the same calls, because a sharded model needs every rank to run.

    Args:
        hellaswag: what `load_hellaswag` returned.
        model: as accelerator.prepare returned it.
        raw_model: neither wrapped nor compiled; for HellaSwag and samples, whose shapes change at nearly every call.
    """

    def __init__(
        self,
        plan: Plan,
        hellaswag: list[EncodedItem],
        accelerator: Accelerator,
        model: torch.nn.Module,
        raw_model: PreTrainedModel,
        telemetry: Telemetry,
    ):
        self.recipe, self.tokenizer, self.val_data = plan.recipe, plan.tokenizer, plan.data.val
        self.folder = RunFolder(plan.recipe.output_dir)
        self.record = run_settings(plan.recipe, plan.data)
        self.next_picture = 0.0  # time from which on loss.png may be drawn again
        self.hellaswag, self.accelerator, self.telemetry = hellaswag, accelerator, telemetry
        self.model, self.raw_model = model, raw_model

    def announce_reference(self) -> None:
        """Say before the first step why the reference that the recipe names is not comparable, if so."""
        verdict = judge(self.record, rows=[])
        if verdict.mismatches:
            self.telemetry.say(verdict.headline)

    def run_due(self, run: RunState) -> None:
        """Run and log the evaluations that are due after step run.step."""
        if run.is_due(self.recipe.validate_every):
            self.validate(run)  # the first, as early stopping makes this step the last, after which all are due
        if self.hellaswag and run.is_due(self.recipe.hellaswag_every):
            self.score_hellaswag(run.step)
        if run.is_due(self.recipe.sample_every):
            self.sample(run.step)

    def before_first_step(self, run: RunState, checkpoints: Checkpoints) -> None:
        """Validate and save the given model as step 0, if that is due."""
        if run.validates_given_model:
            with self.telemetry.paused():
                self.validate(run)
                checkpoints.save(run.state_dict())

    def validate(self, run: RunState) -> None:
        losses = validation_losses(self.model, self.val_data, self.recipe, self.accelerator)
        run.note_validation(losses["val_loss"])
        self.telemetry.log(run.step, **losses)
        if self.accelerator.is_main_process:
            self.telemetry.say(
                f"step {run.step:,}: validation loss {losses['val_loss']:.4f}{self._judge_and_draw(run)}"
            )

    def _judge_and_draw(self, run: RunState) -> str:
        """Draw loss.png, unless that would take more than DRAWING_SHARE of the time or the run draws it at its end.

        Returns:
            What the verdict says about the newest validation; and what failed, which must not end a run.
        """
        began = time.perf_counter()
        remark = ""
        try:
            logged = LoggedRun(self.folder.name, self.record, read_metrics(self.folder.metrics))
            remark = logged.verdict.remark(run.step)
            if began >= self.next_picture and not run.is_last_step:
                write_bytes(self.folder.picture, loss_picture([logged]))
                now = time.perf_counter()
                self.next_picture = now + (now - began) / DRAWING_SHARE
            return remark
        except Exception as error:  # of the disk, or of matplotlib
            return f"{remark}; {self.folder.picture} could not be drawn ({first_line(error)})"

    def score_hellaswag(self, step: int) -> None:
        # A row has the logits of all endings.
        items_per_batch = max(1, self.recipe.sequences_per_micro_batch // ENDINGS)
        metrics = score_encoded(self.raw_model, self.hellaswag, self.accelerator, items_per_batch).metrics()
        self.telemetry.log(step, **metrics)
        self.telemetry.say(f"step {step:,}: HellaSwag acc_norm {metrics['hellaswag_acc_norm']:.4f}")

    def sample(self, step: int) -> None:
        """Continue each of the recipe's prompts. The seed is fixed, so samples of different steps can be compared."""
        recipe = self.recipe
        if not self.predicts:
            self.telemetry.say(f"step {step:,}: no sample, as the model's predictions are not finite")
            return
        with self.accelerator.autocast():
            samples = [
                generate(
                    self.raw_model,
                    self.tokenizer,
                    prompt,
                    recipe.sample_tokens,
                    recipe.seed,
                    temperature=recipe.sample_temperature,
                )
                for prompt in recipe.sample_prompts
            ]
        self.telemetry.log(step, samples=samples)

    @property
    def predicts(self) -> bool:
        """Whether tokens can be drawn from what follows the prompts; an update may have broken the weights."""
        prompts = [encode_prompt(prompt, self.raw_model, self.tokenizer) for prompt in self.recipe.sample_prompts]
        with torch.no_grad(), self.accelerator.autocast():
            return all(self.raw_model(ids).logits[0, -1].max().isfinite() for ids in prompts)


def load_hellaswag(plan: Plan) -> list[EncodedItem]:
    """The HellaSwag items, encoded in completion style; empty if the recipe does not evaluate on HellaSwag."""
    if not plan.recipe.hellaswag_every:
        return []
    items = on_main(lambda: load_items(plan.recipe.hellaswag_data, flag="--hellaswag_data"))
    return [encode_item(item, plan.tokenizer, plan.config.n_positions) for item in items]
