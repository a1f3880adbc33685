"""What a user calls a model, and where it lies. Nothing here opens one, so torch and transformers are not imported."""

import functools
import json
import re
from importlib.util import find_spec
from pathlib import Path

from gpt2repro.data.hub import hub_failure
from gpt2repro.data.manifest import MANIFEST
from gpt2repro.errors import UserError, first_line
from gpt2repro.files import is_special
from gpt2repro.run_folder import RunFolder


WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # the first that exists is read; or their shards
DTYPES = ("auto", "float32", "bfloat16")  # of the weights, as --dtype takes them; auto: as saved
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's
ADAPTED_OR_NOT = (
    f"holds {ADAPTER_CONFIG} beside full weights; delete {ADAPTER_CONFIG} if they are merged already, otherwise move "
    "the adapter's files to another folder and merge the two"
)
# Parts of PEFT's names of what learns a prompt, not a change of the weights.
PROMPT_LEARNING = ("PROMPT", "P_TUNING", "PREFIX", "CPT", "CARTRIDGE")


def find_model(name: str) -> str:
    """Resolve what a user calls a model: a run (its model folder), a model folder, an adapter's folder, another
    trainer's file or a Hub id.

    Raises:
        UserError: a folder without a model, or with an adapter that cannot be merged; a path that does not exist; or a
            Hub id that the Hub does not have, or cannot be asked about.
    """
    path = Path(name).expanduser()
    for candidate in _places(path):
        if is_adapter(candidate):
            adapter_base(candidate)
            return str(candidate)
        if (candidate / "config.json").is_file():
            return str(candidate)
    if path.is_file():
        lies_in_model_folder = path.name in WEIGHT_FILES and (path.parent / "config.json").is_file()
        return str(path.parent if lies_in_model_folder else path)
    if is_special(path):
        raise UserError(f"{name} is a pipe or device; give a model folder, a run folder, a file or a Hub id")
    if path.exists():
        raise UserError(
            f"{name} holds no model: neither config.json nor model/config.json exists; {_what_it_holds(path)}"
        )
    if is_path(name):
        raise UserError(f"{name} does not exist; give a model folder, a run folder or a Hub id")
    _check_hub(name)
    return name


def _places(path: Path) -> tuple[Path, Path]:
    """Where a path's model may lie: it is a run, or the model itself."""
    return RunFolder(path).model, path


def _what_it_holds(folder: Path) -> str:
    """The remedy for a folder that is no model: the newest of what it holds that is one."""
    newest = RunFolder(folder).latest_checkpoint()
    if newest:
        return f"it is an unfinished run, and its newest checkpoint is {newest}"
    if (folder / MANIFEST).is_file():
        return "it is prepared data; give a model that was trained on it"

    def holds_model(path: Path) -> bool:
        run = RunFolder(path)
        is_folder = any((place / "config.json").is_file() for place in (path, run.model))
        return path.match("*.pt") or path.match("model*.bin") or is_folder or run.latest_checkpoint() is not None

    def age(path: Path) -> tuple[list[int], float]:
        return [int(number) for number in re.findall(r"\d+", path.name)], path.stat().st_mtime

    found = sorted(filter(holds_model, folder.iterdir()), key=age)
    if found:
        return f"give {found[-1]}"
    return "give a model folder, a run, a checkpoint, a Hub id, or a file of another trainer"


def is_path(name: str) -> bool:
    """Whether a name can only be a path, not a Hub id."""
    return name.count("/") > 1 or name.startswith((".", "/", "~"))


def is_adapter(path: str | Path) -> bool:
    """Whether a path is the folder of an adapter, which PEFT can merge into the model that it was trained on."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def adapter_base(folder: Path) -> str:
    """The model that an adapter was trained on, as `find_model` finds it.

    Raises:
        UserError: it is not there, the adapter is of a kind that cannot be merged into it or lies beside full weights,
            or PEFT is not installed.
    """
    from gpt2repro.models.errors import explained

    if _has_weights(folder):
        raise UserError(f"{folder} {ADAPTED_OR_NOT}")
    with explained(f"{folder / ADAPTER_CONFIG} is damaged", "save the adapter again"):
        settings = dict(json.loads((folder / ADAPTER_CONFIG).read_text()))
        kind, base = str(settings.get("peft_type")), settings.get("base_model_name_or_path")
    problem = f"{folder} is an adapter ({kind} in {ADAPTER_CONFIG})"
    if any(word in kind for word in PROMPT_LEARNING):
        raise UserError(f"{problem} of a kind that cannot be merged into a model; give the model that it was made for")
    if not base or not isinstance(base, str):
        raise UserError(f"{problem}; write the name of its base model to base_model_name_or_path there")
    if settings.get("megatron_config"):  # PEFT imports the module that megatron_core names
        raise UserError(f"{problem} whose megatron_config names code to run; set it to null if you know the adapter")
    if any(map(is_adapter, _places(Path(base).expanduser()))):
        raise UserError(f"{problem} of another adapter, {base}; merge that first, and write the result's name there")
    if find_spec("peft") is None:
        raise UserError(f'{problem}, which PEFT merges; run `pip install "gpt2repro[lora]"`')
    try:
        return find_model(base)
    except UserError as error:
        raise UserError(f"{problem} whose base_model_name_or_path is not found from here: {error}") from error


@functools.cache  # a script resolves a name when it checks its flags, and again when it opens the model
def _check_hub(name: str) -> None:
    """Refuse a name for which neither the cache nor the Hub has a model."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    from gpt2repro.models.errors import ACCESS_DENIED, LOG_IN

    error = hub_failure(name, "config.json")
    if error is None:
        return
    remedy = "check the name and the network"
    if isinstance(error, HfHubHTTPError) and error.response.status_code in ACCESS_DENIED:
        remedy = LOG_IN
    if isinstance(error, EntryNotFoundError):
        remedy = "give a model that has a config.json"
    raise UserError(
        f"{name}: no such file or folder, and no model can be loaded from the Hub ({first_line(error)}); {remedy}"
    ) from error


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for file in WEIGHT_FILES for name in (file, f"{file}.index.json"))
