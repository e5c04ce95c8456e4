"""llama.cpp on a CPU, by the wheel `xllamacpp`: its server, given the model as an export in float32."""

import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xllamacpp

from p828.bench.generation.generator import Timed
from p828.bench.generation.workload import WARM_STEPS
from p828.bench.systems import System
from p828.config import Config, TokenizerConfig
from p828.config.values import to_dict
from p828.data.tokenizer.training import train_tokenizer
from p828.interchange.gguf import export_gguf
from p828.model.init import initialise
from p828.model.transformer import Transformer
from p828.train import checkpoint_writer


class LlamaCppGenerator:
    """A `p828.bench.generation.generator.Generator`, with a server for each number of slots."""

    dtype = "float32"

    def __init__(self, system: System) -> None:
        self.config = system.config
        self.directory = tempfile.TemporaryDirectory(prefix="p828-bench-")
        self.file = Path(self.directory.name) / "model.gguf"
        export_gguf(_saved(self.config, Path(self.directory.name)), self.file, "float32")
        self.server: xllamacpp.Server | None = None
        self.slots = self.length = 0

    def steps(self, prompts: Sequence[Sequence[int]], steps: int, is_sampled: bool) -> Timed:
        """The prompts are read first, by requests of their own; their keys and values stay in their slots."""
        assert not is_sampled
        length = len(prompts[0]) + WARM_STEPS + steps + 8
        self._serve(len(prompts), length)
        self._ask_together(prompts, WARM_STEPS)
        started = time.perf_counter()
        answers = self._ask_together(prompts, steps)
        seconds = time.perf_counter() - started
        # Of one sequence alone, the server's own clock leaves the request out.
        if len(prompts) == 1:
            timings = answers[0]["timings"]
            seconds = timings["predicted_ms"] / 1e3 * steps / timings["predicted_n"]
        return Timed(seconds / steps, len(prompts[0]) + steps / 2)

    def first_token(self, prompt: Sequence[int]) -> float:
        self._serve(1, len(prompt) + 8)
        started = time.perf_counter()
        self._ask(prompt, 1, 0, is_cached=False)
        return time.perf_counter() - started

    def _ask_together(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = [{} for _ in prompts]

        def ask(slot: int) -> None:
            answers[slot] = self._ask(prompts[slot], tokens, slot, is_cached=True)

        threads = [threading.Thread(target=ask, args=(slot,)) for slot in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers

    def _ask(self, prompt: Sequence[int], tokens: int, slot: int, is_cached: bool) -> dict[str, Any]:
        assert self.server is not None
        request = {
            "prompt": list(prompt), "n_predict": tokens, "temperature": 0.0, "ignore_eos": True,
            "cache_prompt": is_cached, "id_slot": slot,
        }  # fmt: skip
        answer: dict[str, Any] = self.server.handle_completions(request)
        assert answer["timings"]["predicted_n"] == tokens, answer
        return answer

    def _serve(self, slots: int, length: int) -> None:
        if self.server is not None and slots == self.slots and length <= self.length:
            return
        self.server = None
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(self.file)
        parameters.n_ctx = slots * (length + 256)
        parameters.n_parallel = slots
        parameters.cpuparams.n_threads = torch.get_num_threads()
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.fit_params = False
        parameters.verbosity = 0
        self.server, self.slots, self.length = xllamacpp.Server(parameters), slots, length


def build(system: System) -> LlamaCppGenerator:
    return LlamaCppGenerator(system)


def _saved(config: Config, directory: Path) -> Path:
    """A checkpoint with the weights of `config.train.seed`, and a small tokenizer that names the first rows."""
    model = Transformer(config.model)
    initialise(model, config.train.seed)
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=280), ["a text of few words " * 10])
    state = {"config": to_dict(config), "tokenizer": tokenizer.fingerprint()}
    checkpoint_writer.save(directory / "checkpoints", 1, {"model": model.state_dict(), "optimizer": {}}, state)
    tokenizer.save(directory / "tokenizer.json")
    return directory
