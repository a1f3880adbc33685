"""What each setting of recipes/shakespeare-char-cpu-fast.yaml is worth: the final validation loss if it is changed.

    python benchmarks/fast_recipe.py --data_dir data/shakespeare-char --seeds 1337 1338 1339

Every variant is trained by the package's own parts, with the recipe's number of steps, on one thread, in bf16 with
eager attention, which on a CPU takes half the time of float32 at these sizes. The loss is that over all validation
windows, nats per token, one a seed. Beside it stand the mean difference from the recipe, seed by seed, and the smallest
and the largest one: a change that helps one seed and harms another is noise.
"""

import argparse
import dataclasses
import datetime
import json
import statistics
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from gpt2repro.data.batches import MicroBatches
from gpt2repro.data.mixture import RunData
from gpt2repro.errors import quiet_broken_pipe
from gpt2repro.evaluation.validation import validation_losses
from gpt2repro.processes import device_name
from gpt2repro.recipe import Recipe
from gpt2repro.recipe_file import parse_recipe
from gpt2repro.train.muon import Muon
from gpt2repro.train.optimizers import OPTIMIZERS, build_optimizers, muon, set_lr
from gpt2repro.train.report import provenance
from gpt2repro.train.schedule import lr_at
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM


RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "shakespeare-char-cpu-fast.yaml"
THE_RECIPE = "the recipe"
VARIANTS: dict[str, dict] = {
    THE_RECIPE: {},
    "q, k and v as one matrix": {"optimizer": "muon_joint"},
    "a warm-up of 20 steps": {"warmup_steps": 20},
    "weight decay of the embeddings 0.1": {"weight_decay": 0.1},
    "no weight decay of the matrices": {"muon_weight_decay": 0.0},
    "cautious weight decay": {"optimizer": "muon_cautious"},
    "linearly falling weight decay": {"optimizer": "muon_falling_decay"},
    "decay over the last 40% only": {"lr_schedule": "wsd", "decay_fraction": 0.4, "decay_shape": "linear"},
    "momentum 0.95": {"muon_momentum": 0.95},
    "AdamW's rate a third": {"learning_rate": 1 / 3},
    "AdamW's rate three times": {"learning_rate": 3.0},
    "Muon's rate 0.6 times": {"muon_learning_rate": 0.6},
    "Muon's rate 1.6 times": {"muon_learning_rate": 1.6},
}
RELATIVE = ("learning_rate", "muon_learning_rate")  # what VARIANTS gives as a multiple of the recipe's


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    OPTIMIZERS.update(muon_joint=muon_joint, muon_falling_decay=muon, muon_cautious=muon_cautious)
    recipe, problems = parse_recipe(["--config", str(RECIPE), "--data_dir", args.data_dir], RECIPE, GPT2ReproConfig)
    assert not problems, problems
    data, accelerator = RunData.open(recipe.sources), Accelerator(cpu=True, mixed_precision="bf16")
    result = {
        "date": datetime.date.today().isoformat(),
        "device": device_name(accelerator.device),
        "versions": provenance(),
        "recipe": dataclasses.asdict(recipe),
        "losses": finished_losses(args.output, recipe),
    }
    for name, changes in VARIANTS.items():
        losses = result["losses"].setdefault(name, {})
        for seed in map(str, args.seeds):
            if seed not in losses:
                losses[seed] = train(variant_of(recipe, changes, int(seed)), data, accelerator)
                Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
        print(row_of(name, losses, result["losses"][THE_RECIPE]), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data/shakespeare-char")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    parser.add_argument(
        "--output", default="runs/fast_recipe.json", help="JSON file for every number; what it already has is reused"
    )
    return parser.parse_args()


def variant_of(recipe: Recipe, changes: dict, seed: int) -> Recipe:
    """The recipe with the changes of one of VARIANTS."""
    values = {name: value * getattr(recipe, name) if name in RELATIVE else value for name, value in changes.items()}
    return dataclasses.replace(recipe, seed=seed, **values)


def train(recipe: Recipe, data: RunData, accelerator: Accelerator) -> float:
    """The final validation loss."""
    set_seed(recipe.seed)
    vocabulary = {"vocab_size": data.tokenizer.vocab_size, "unpadded_vocab_size": data.tokenizer.vocab_size}
    special_tokens = {"bos_token_id": None, "eos_token_id": None}
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**vocabulary, **special_tokens, **recipe.model))
    model.set_attn_implementation(recipe.attention)
    optimizers = build_optimizers(model, recipe)
    batches = MicroBatches(data.train, recipe, rank=0, num_processes=1)
    for step in range(recipe.max_steps):
        tokens = batches[step, 0]
        with accelerator.autocast():
            loss = model(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        set_lr(optimizers, lr_at(step, recipe))
        if recipe.optimizer == "muon_falling_decay":
            set_weight_decay(optimizers[1], recipe.muon_weight_decay * (1 - step / recipe.max_steps))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return validation_losses(model, data.val, recipe, accelerator)["val_loss"]


# ---- optimizers that only this file knows ----


def muon_joint(model: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """The query, key and value projection as one matrix, as torch.optim.Muon takes it."""
    adamw, of_matrices = muon(model, recipe)
    for group in of_matrices.param_groups:
        group["n_matrices"] = 1
    return [adamw, of_matrices]


def set_weight_decay(optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay


class CautiousMuon(Muon):
    """Weights decay only where the update makes them smaller too.

    Source: Chen et al. 2025, "Cautious Weight Decay".
    """

    weight_decay: float

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["before"] = [p.clone() for p in group["params"]]
        super().step()
        for group in self.param_groups:
            for p, before in zip(group["params"], group.pop("before")):
                shrinks = (p - before) * before < 0
                p.sub_(before * shrinks, alpha=group["lr"] * self.weight_decay)


def muon_cautious(model: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    adamw, of_matrices = muon(model, recipe)
    cautious = CautiousMuon(of_matrices.param_groups, recipe.muon_learning_rate, recipe.muon_momentum, 0.0)
    set_weight_decay(cautious, 0.0)
    cautious.weight_decay = recipe.muon_weight_decay
    return [adamw, cautious]


# ---- results ----


def finished_losses(output: str, recipe: Recipe) -> dict[str, dict[str, float]]:
    """Losses by variant and seed from an earlier call with the same recipe."""
    if not Path(output).exists():
        return {}
    earlier = json.loads(Path(output).read_text())
    return earlier["losses"] if earlier["recipe"] == dataclasses.asdict(recipe) else {}


def row_of(name: str, losses: dict[str, float], of_recipe: dict[str, float]) -> str:
    """A row of the table: losses by seed, and their differences from the recipe's."""
    differences = [losses[seed] - of_recipe[seed] for seed in losses]
    of_seeds = " ".join(f"{loss:.4f}" for loss in losses.values())
    spread = f"{min(differences):+.4f} to {max(differences):+.4f}"
    return f"{name:36s} {of_seeds}  {statistics.fmean(differences):+.4f} ({spread})"


if __name__ == "__main__":
    with quiet_broken_pipe():
        main()
