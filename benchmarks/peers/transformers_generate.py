"""transformers' `generate` on the architecture that an export of the model would have, with random weights."""

import time
from collections.abc import Sequence

import torch
import transformers
from torch import Tensor

from p828.bench.generation.generator import Timed
from p828.bench.generation.workload import WARM_STEPS
from p828.bench.systems import System
from p828.interchange.architectures.native import architecture_of
from p828.system.device import pick_device, pick_dtype


class Clock(transformers.StoppingCriteria):
    """Notes when each token of the batch is known, and ends nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, list[float]()

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # generate itself waits in each step, to see whether all have ended
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=self.device)


class TransformersGenerator:
    """A `p828.bench.generation.generator.Generator`; what is not set here is transformers' default."""

    def __init__(self, system: System) -> None:
        config = system.config
        self.device = pick_device(config.train.device)
        dtype = pick_dtype(config.train.dtype, self.device)
        self.dtype = str(dtype).removeprefix("torch.")
        torch.manual_seed(config.train.seed)
        values = architecture_of(config.model, native_only=True).to_config(config.model)
        with self.device:
            model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values))
        self.model = model.to(self.device, dtype).eval()
        # A static cache makes `generate` compile the forward pass of a step on a GPU.
        self.cache = {"cache_implementation": "static"} if system.options.get("is_compiled") else {}

    def steps(self, prompts: Sequence[Sequence[int]], steps: int, is_sampled: bool) -> Timed:
        assert not is_sampled
        times = self.times(prompts, WARM_STEPS + steps + 1)[WARM_STEPS:]
        length = len(prompts[0]) + WARM_STEPS
        return Timed((times[-1] - times[0]) / (len(times) - 1), length + len(times) / 2)

    def first_token(self, prompt: Sequence[int]) -> float:
        started = time.perf_counter()
        (first,) = self.times([prompt], 1)
        return first - started

    def times(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[float]:
        """When each token of all prompts was known."""
        tokens_BS = torch.tensor(prompts, device=self.device)
        clock = Clock(self.device)
        self.model.generate(
            tokens_BS,
            attention_mask=torch.ones_like(tokens_BS),
            max_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=[clock],
            eos_token_id=None,
            pad_token_id=0,
            **self.cache,
        )
        return clock.times


def build(system: System) -> TransformersGenerator:
    return TransformersGenerator(system)
