"""The plain model inside what training wraps around it, and the whole tensor of one that it shards."""

import torch
from accelerate.utils import extract_model_from_parallel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def unwrapped(model: torch.nn.Module) -> PreTrainedModel:
    """The plain model inside DDP, torch.compile or FSDP2, whose shards are gathered: all processes call, and the main
    one gets the weights, on the CPU.

    A model that fully_shard has changed is not saved as it is: its class is one of torch's by then, and
    save_pretrained would write torch's files as the model's code.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if not isinstance(model, FSDPModule):
        return model
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    plain_class = next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))
    with torch.device("meta"):
        plain = plain_class(model.config)
    if state:  # only the main process has it
        plain.load_state_dict(state, assign=True)
        plain.tie_weights()
    return plain


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself; of one that is sharded by FSDP2 all of it, for which all processes call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
