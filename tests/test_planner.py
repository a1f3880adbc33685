"""python -m gpt2repro.planner: what it prints, and what it refuses."""

import re
import subprocess
import sys

import pytest
from support import PATIENCE, ROOT

from gpt2repro import planner
from gpt2repro.errors import UserError


RECIPE = str(ROOT / "recipes" / "gpt2-124m-fineweb-edu.yaml")


def printed(capsys, *args: object) -> str:
    planner.main([str(arg) for arg in args])
    return capsys.readouterr().out


def refusal(*args: object) -> list[str]:
    with pytest.raises(UserError) as caught:
        planner.main([str(arg) for arg in args])
    return str(caught.value).splitlines()


def test_the_published_run_of_eight_h100(capsys):
    text = printed(capsys, RECIPE, "--gpu", "h100", "--num_gpus", 8, "--dollars_per_hour", 20)
    assert "124,475,904 parameters" in text and "(6ND: 7.47e+18)" in text
    assert "64 sequences x 1024 tokens x 8 (GPUs) x 1 (accumulation) = 524,288 tokens" in text
    assert "step        140 ms" in text and "hidden by computation" in text and "0.76 hours, $15, 4.3 kWh" in text
    assert "| MiB on one GPU, 64 sequences | ddp | fsdp2 |" in text
    assert "ddp_8gpu.yaml" in text and "--num_processes" not in text


def test_one_24_gb_card_gets_a_command_that_fits(capsys):
    text = printed(capsys, RECIPE, "--gpu", "rtx4090")
    assert text.endswith(f"    train_accelerate.py --config {RECIPE} --micro_batch_size 32\n")
    medium = ("--model.n_layer", 24, "--model.n_head", 16, "--model.n_embd", 1024)
    assert "--gradient_checkpointing" not in printed(capsys, RECIPE, "--gpu", "rtx4090", *medium)
    xl = printed(capsys, str(ROOT / "recipes" / "gpt2-xl-fineweb-edu.yaml"), "--gpu", "rtx4090")
    assert "does not fit on NVIDIA GeForce RTX 4090 even with one sequence" in xl


def test_the_command_trains_what_was_planned(capsys):
    """Flags of the recipe are repeated, the planner's own answers come last and win."""
    given = ("--model.n_layer", 24, "--model.n_head", 16, "--model.n_embd", 1024, "--micro_batch_size", 64)
    text = printed(capsys, "--config", RECIPE, "--gpu", "rtx4090", *given)
    assert text.startswith(f"{RECIPE} on 1 x ")
    *_, launch, train = text.splitlines()
    assert launch == "accelerate launch --config_file accelerate_configs/single_gpu.yaml \\"
    assert train == f"    train_accelerate.py --config {RECIPE} {' '.join(map(str, given))} --micro_batch_size 16"


def test_auto_is_planned_as_the_largest_micro_batch(capsys):
    """Even where the recipe's own number would fit."""
    text = printed(capsys, RECIPE, "--gpu", "rtx4090", "--micro_batch_size", "auto")
    assert "| MiB on one GPU, 32 sequences | ddp |" in text and "batch       32 sequences x 1024 tokens x 1" in text
    assert text.endswith(" --micro_batch_size auto --micro_batch_size 32\n")
    large = printed(capsys, RECIPE, "--gpu", "h200", "--micro_batch_size", "auto")
    assert "batch       256 sequences x 1024 tokens x 1" in large


def test_a_schedule_that_the_trainer_would_refuse_is_refused():
    (problem,) = refusal(RECIPE, "--max_steps", 100)
    assert problem.startswith("warmup_steps=715 must be below max_steps=100")


@pytest.mark.parametrize(
    ("flags", "file", "launched"),
    [
        (("--num_gpus", 8), "ddp_8gpu", []),
        (("--num_gpus", 4), "ddp_8gpu", ["--num_processes 4"]),
        (("--num_gpus", 8, "--mixed_precision", "no"), "ddp_8gpu", ["--mixed_precision no"]),
        (("--num_gpus", 8, "--gpus_per_machine", 4), "ddp_2node", ["--num_processes 8"]),
        (("--num_gpus", 16, "--strategy", "fsdp2"), "fsdp2_8gpu", ["--num_processes 16 --num_machines 2"]),
        (("--num_gpus", 8, "--strategy", "hsdp"), "fsdp2_8gpu", []),
        (("--num_gpus", 16, "--strategy", "hsdp"), "hsdp_2node", []),
        (
            ("--num_gpus", 32, "--strategy", "hsdp"),
            "hsdp_2node",
            ["--num_processes 32 --num_machines 4 --parallelism_config_dp_replicate_size 4"],
        ),
        (("--gpu", "cpu", "--peak_tflops", 0.2, "--mixed_precision", "bf16"), "cpu", ["--mixed_precision bf16"]),
    ],
)
def test_the_launcher_starts_what_was_planned(capsys, flags, file, launched):
    launch = printed(capsys, RECIPE, "--micro_batch_size", 1, *flags).splitlines()[-2]
    several = ["--machine_rank RANK --main_process_ip ADDRESS_OF_MACHINE_0"] if "2node" in file or 16 in flags else []
    words = ["accelerate launch --config_file", f"accelerate_configs/{file}.yaml", *launched, *several, "\\"]
    assert launch == " ".join(words)


@pytest.mark.parametrize("gpu", planner.PLANNED)
def test_every_gpu_and_strategy_is_planned(capsys, gpu):
    for strategy in ("ddp", "fsdp2", "hsdp"):
        text = printed(capsys, RECIPE, "--gpu", gpu, "--num_gpus", 16, "--strategy", strategy)
        assert (
            "GB over the network (400 Gbit/s)" in text
            and "| MiB on one GPU, 32 sequences | ddp | fsdp2 | hsdp |" in text
        )


@pytest.mark.parametrize(("strategy", "shown"), [("ddp", "ddp | fsdp2"), ("hsdp", "ddp | fsdp2 | hsdp")])
def test_the_strategy_that_is_asked_for_is_shown(capsys, strategy, shown):
    text = printed(capsys, RECIPE, "--num_gpus", 8, "--strategy", strategy)
    assert f"| MiB on one GPU, 64 sequences | {shown} |" in text


def test_this_cpu_is_planned_by_its_free_memory_and_a_given_rate(capsys):
    text = printed(capsys, "--gpu", "cpu", "--peak_tflops", 0.17)
    assert re.search(r"this CPU \(\d+\.\d GiB free, 0\.17 TFLOP/s\), mixed_precision=no", text)
    assert "accelerate_configs/cpu.yaml" in text and "demo.yaml" in text


def test_an_openai_model_is_planned_by_name_and_another_by_its_folder(capsys, tmp_path):
    assert "1,557,686,400 parameters" in printed(capsys, RECIPE, "--init_from", "gpt2-xl", "--gpu", "h200")
    (tmp_path / "config.json").write_text('{"n_layer": 2, "n_head": 2, "n_embd": 64, "n_inner": null}')
    assert "2 layers, 2 heads, width 64" in printed(capsys, RECIPE, "--init_from", tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "config.json").rename(tmp_path / "run" / "config.json")
    (tmp_path / "run").rename(tmp_path / "model")  # as in a run's folder
    assert "2 layers, 2 heads, width 64" in printed(capsys, RECIPE, "--init_from", tmp_path)
    cropped = printed(capsys, RECIPE, "--init_from", "gpt2", "--sequence_length", 512)
    assert f"{124_475_904 - 512 * 768:,} parameters" in cropped


def test_all_mistakes_are_one_line_each():
    assert refusal(RECIPE, "--gpu", "h100", "--micro_batch", 3, "--mfu", 2, "--num_gpus", 0) == [
        "unknown recipe field --micro_batch; did you mean --micro_batch_size?",
        "--num_gpus 0 must be at least 1",
        "--mfu 2.0 must be above 0 and at most 1, e.g. 0.4",
    ]
    (problem,) = refusal(RECIPE, "--num_gpus", 24)
    assert problem.startswith("global_batch_tokens=524288 is not a multiple of 1024 x 24 = 24576")
    assert problem.endswith("use global_batch_tokens=516096, or another --num_gpus")
    (problem,) = refusal(RECIPE, "--num_gpus", 12)
    assert problem == "--num_gpus 12 is not a multiple of --gpus_per_machine 8"
    (problem,) = refusal(RECIPE, "--init_from", "nowhere")
    assert problem.startswith("init_from=nowhere: nowhere/config.json is not one of a GPT-2; give a run or")
    assert refusal(RECIPE, "--model.n_layer", 0) == ["model.n_layer=0 must be at least 1"]
    (problem,) = refusal(RECIPE, "--gpu", "h999")
    assert "invalid choice: 'h999'" in problem


@pytest.mark.slow
def test_it_needs_no_torch():
    check = "import sys; from gpt2repro import planner; planner.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", check, RECIPE, "--gpu", "h100", "--num_gpus", "8"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=PATIENCE, stdout=subprocess.DEVNULL)
