"""Whether the device computes the model of a configuration, and with which code."""

import torch

from p828.config import Config, with_vocabulary
from p828.data.fractions import short
from p828.doctor.check import Check
from p828.errors import ConfigError
from p828.model.backend import allows_cuda_graph, check_widths, remarks, uses_triton
from p828.model.costs import count_parameters
from p828.system.device import pick_dtype


def check_model(config: Config, device: torch.device) -> Check:
    """The sizes that the device's kernels take, the dtype, and what has no kernel where the rest of the model has."""
    name, config = "model", with_vocabulary(config)
    parameters = count_parameters(config.model)
    text = f"{short(parameters.total)} parameters, {short(parameters.active)} active for a token"
    try:
        dtype = pick_dtype(config.train.dtype, device)
        check_widths(config.model, device, dtype)
    except ConfigError as error:
        return Check(name, "failure", f"{text}; {error}", "change that key, or train on another device")
    text += f", in {str(dtype).removeprefix('torch.')}"
    if lines := remarks(config.model, device, dtype):
        return Check(name, "warning", f"{text}; {'; '.join(lines)}", "slower, but the same model")
    if uses_triton(device, dtype):
        text += " on p828's kernels" + (", as CUDA graphs" if allows_cuda_graph(config.model, device, dtype) else "")
    return Check(name, "ok", text)
