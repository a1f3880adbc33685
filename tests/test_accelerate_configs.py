"""Every accelerate config, up to the plugin that Accelerate builds from it in a launched process.

Accelerate silently ignores unknown keys inside fsdp_config, fp8_config and the like, and its launcher ignores some
top-level ones. So each key must be an option of `accelerate launch`, and must change what is launched.
"""

import os
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import (
    AORecipeKwargs,
    DeepSpeedPlugin,
    FullyShardedDataParallelPlugin,
    TorchDynamoPlugin,
    patch_environment,
)
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from support import ROOT
from tiny_models import tiny_model
from torch.distributed.fsdp import CPUOffloadPolicy, StateDictType


CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
NAMES = [path.stem for path in CONFIGS]
NOT_OPTIONS = {"compute_environment", "distributed_type"}  # only read from the file


def settings(path: Path) -> dict:
    """The keys of a config, with its sections flattened; the file may omit a section's prefix."""
    flat = {}
    for key, value in yaml.safe_load(path.read_text()).items():
        if isinstance(value, dict):
            prefix = {"fsdp_config": "fsdp_", "fp8_config": "fp8_", "dynamo_config": "dynamo_"}.get(key, "")
            flat |= {name if name.startswith(prefix) else prefix + name: item for name, item in value.items()}
        else:
            flat[key] = value
    return flat


def launch_arguments(path: Path, *flags: str):
    """The arguments of `accelerate launch --config_file path ...`, merged with the file."""
    command = ["--config_file", str(path), "--main_process_ip", "127.0.0.1", *flags, "train_accelerate.py"]
    return _validate_launch_command(launch_command_parser().parse_args(command))[0]


def launch_environment(path: Path, *flags: str) -> dict[str, str]:
    """The environment in which launch_command starts the processes of a config."""
    arguments = launch_arguments(path, "--main_process_port", "0", *flags)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(settings(path))
        return prepare_deepspeed_cmd_env(arguments)[1]
    if arguments.use_fsdp or arguments.multi_gpu:
        return prepare_multi_gpu_env(arguments)
    return prepare_simple_launcher_cmd_env(arguments)[1]


def problems(path: Path) -> list[str]:
    """The keys of a config that have no effect: unknown options, and values that the launcher drops."""
    options = vars(launch_command_parser().parse_args(["train_accelerate.py"])).keys() | {"use_cpu"}
    taken = vars(launch_arguments(path))
    given = {name: value for name, value in settings(path).items() if name not in NOT_OPTIONS}
    return [name for name, value in given.items() if name not in options or taken[name] != value]


@pytest.fixture
def launched(request):
    """Run the test in the environment of a launched process."""
    path = next(path for path in CONFIGS if path.stem == request.param)
    with patch_environment(**launch_environment(path)):
        yield settings(path)


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_every_key_has_an_effect(path):
    assert problems(path) == []


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("fsdp_version: 2", "fsdp_versoin: 2"),
        ("fsdp_auto_wrap_policy", "auto_wrap_polcy"),
        ("parallelism_config_dp_shard_size", "dp_shard_size"),  # the launcher adds no prefix here
        ("machine_rank: 0", "machine_rank: 0\nsame_network: true"),  # ignored: the flag always has a value
    ],
)
def test_a_key_without_effect_is_found(right, wrong, tmp_path):
    config = next(path for path in CONFIGS if path.stem == "hsdp_2node").read_text()
    broken = tmp_path / "broken.yaml"
    broken.write_text(config.replace(right, wrong))
    assert len(problems(broken)) == 1


def test_an_unknown_top_level_key_is_refused(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text(CONFIGS[0].read_text() + "num_procceses: 2\n")
    with pytest.raises(ValueError, match="unknown keys"):
        launch_arguments(broken)


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_the_number_of_processes_matches_the_name(path):
    arguments = launch_arguments(path, "--main_process_port", "0")
    machines = 2 if "2node" in path.stem else 1
    local = {"8gpu": 8, "2node": 8, "multi_cpu": 2}
    local = next((count for part, count in local.items() if part in path.stem), 1)
    assert (arguments.num_machines, arguments.num_processes) == (machines, machines * local)
    if machines * local > 1 and not arguments.use_deepspeed:
        prepare_multi_gpu_env(arguments)
        assert arguments.nproc_per_node == str(local)
        assert machines == 1 or arguments.rdzv_endpoint.startswith("127.0.0.1:")


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_the_precision_reaches_the_processes(path):
    precision = yaml.safe_load(path.read_text())["mixed_precision"]
    if precision == "fp8":
        pytest.importorskip("torchao", reason="the launcher refuses fp8 without torchao; pip install torchao")
    assert launch_environment(path)["ACCELERATE_MIXED_PRECISION"] == precision
    assert launch_environment(path, "--mixed_precision", "fp16")["ACCELERATE_MIXED_PRECISION"] == "fp16"


# ---- sharded ----


@pytest.mark.parametrize("launched", ["fsdp2_8gpu", "fsdp2_offload_8gpu", "hsdp_2node"], indirect=True)
def test_fsdp2_shards_each_block(launched):
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT and not plugin.cpu_ram_efficient_loading
    assert isinstance(plugin.cpu_offload, CPUOffloadPolicy) == launched["fsdp_offload_params"]

    model = tiny_model(n_embd=8)
    plugin.set_auto_wrap_policy(model)
    wrapped = {type(m) for m in model.modules() if plugin.auto_wrap_policy(m, recurse=False, nonwrapped_numel=0)}
    assert wrapped == {type(model.transformer.h[0])}
    assert plugin.transformer_cls_names_to_wrap == list(model._no_split_modules) == ["GPT2ReproBlock"]

    # Compiling the whole model would bypass the hooks through which FSDP2 gathers the blocks.
    assert TorchDynamoPlugin(backend="inductor").use_regional_compilation


@pytest.mark.parametrize("launched", ["hsdp_2node"], indirect=True)
def test_hsdp_shards_within_a_machine_and_replicates_across_machines(launched):
    assert os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"
    parallelism = ParallelismConfig()
    assert parallelism.total_size == launched["num_processes"]
    assert parallelism._get_mesh() == (("dp_replicate", "dp_shard"), (2, 8))  # neighbouring ranks shard
    assert parallelism.fsdp_dim_names == ["dp_replicate", "dp_shard_cp"]


@pytest.mark.parametrize("launched", ["deepspeed_zero2_8gpu"], indirect=True)
def test_deepspeed_uses_zero_stage_2_and_takes_the_rest_from_the_recipe(launched):
    pytest.importorskip("deepspeed", reason="the plugin needs DeepSpeed; pip install deepspeed")
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision("bf16")
    config = plugin.deepspeed_config
    assert plugin.zero_stage == config["zero_optimization"]["stage"] == 2 and config["bf16"]["enabled"]
    left_open = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert {config[name] for name in left_open} == {"auto"}


# ---- fp8 ----


def test_fp8_converts_all_block_matrices_except_the_first():
    pytest.importorskip("torchao", reason="fp8 needs torchao; pip install torchao")
    from accelerate.utils.ao import convert_model_to_fp8_ao
    from torchao.float8.float8_linear import Float8Linear

    model = tiny_model(n_embd=16)
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    names, total = list(model.state_dict()), model.num_parameters()
    trained_by_the_optimizer = {id(parameter) for parameter in model.parameters()}  # it is built before
    path = next(path for path in CONFIGS if path.stem == "single_gpu_fp8")
    with patch_environment(**launch_environment(path)):
        assert os.environ["ACCELERATE_FP8_BACKEND"] == "AO"
        recipe = AORecipeKwargs()
    assert recipe.config.pad_inner_dim
    convert_model_to_fp8_ao(model, config=recipe.config, module_filter_func=recipe.module_filter_func)
    converted = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    assert linears - converted == {"transformer.h.0.attn.c_attn", "lm_head"}
    assert list(model.state_dict()) == names and model.num_parameters() == total  # checkpoints load without torchao
    assert model.lm_head.weight is model.transformer.wte.weight
    assert {id(parameter) for parameter in model.parameters()} == trained_by_the_optimizer
