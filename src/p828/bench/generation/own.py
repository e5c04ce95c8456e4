"""p828's decoder with random weights, and reading everything again in its place."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from p828.bench.generation.generator import Timed
from p828.bench.generation.workload import WARM_STEPS, random_prompts, slot_length
from p828.config import Config
from p828.inference.decode.decoder import Decoder
from p828.inference.decode.sequence import NOTHING_MORE, DecodedSequence, Wants
from p828.inference.load import store_in
from p828.inference.sampling_config import SamplingConfig
from p828.model.backend import computable
from p828.model.init import initialise
from p828.model.transformer import Transformer
from p828.system.device import pick_device, pick_dtype

TEMPERATURE, TOP_P = 0.8, 0.95
"""Of the steps that draw."""


class OwnGenerator:
    def __init__(self, config: Config) -> None:
        """Weights of `config.train.seed`, in the dtype that `train.dtype` means on the device."""
        self.device = pick_device(config.train.device)
        sizes, self.torch_dtype = computable(config.model, self.device, pick_dtype(config.train.dtype, self.device))
        with self.device:
            self.model = Transformer(sizes)
        initialise(self.model, config.train.seed)
        store_in(self.model, self.torch_dtype)
        self.model = self.model.to(self.device).eval()
        self.dtype = str(self.torch_dtype).removeprefix("torch.")
        self._decoder: Decoder | None = None
        self._slots = self._length = 0

    def steps(self, prompts: Sequence[Sequence[int]], steps: int, is_sampled: bool) -> Timed:
        with self.begun(prompts, steps, is_sampled) as (decoder, sequences):
            counts = [_cached(sequences)]
            started = time.perf_counter()
            known = _continue(decoder, steps * len(sequences))
            seconds = time.perf_counter() - started
            counts.append(_cached(sequences))
        return Timed(seconds * len(sequences) / known, sum(counts) / 2)

    def first_token(self, prompt: Sequence[int]) -> float:
        decoder = self._decoder_for(1, len(prompt) + 2)
        self._settle()
        started = time.perf_counter()
        sequence = decoder.admit(prompt, SamplingConfig(temperature=0, max_new_tokens=2), seed=0)
        while not sequence.continuation:
            decoder.step()
        seconds = time.perf_counter() - started
        if sequence.finish_reason is None:
            decoder.cancel(sequence)
        return seconds

    def distinct_experts(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        """Routed experts that a step of the batch goes through, in the mean over layers and steps."""
        counts: list[int] = []
        with self.begun(prompts, steps, False, Wants(experts=True)) as (decoder, _):
            for _ in range(steps):
                chosen = [token.experts_LK for token in decoder.step() if token.experts_LK is not None]
                layers = zip(*chosen, strict=True)
                counts += [len({expert for experts_K in layer for expert in experts_K}) for layer in layers]
        return sum(counts) / len(counts)

    @torch.inference_mode()
    def recomputed(self, length: int) -> float:
        """Seconds for one more token by the training forward over the whole context, not compiled."""
        tokens_1S = torch.tensor(random_prompts(self.model.config.vocab_size, 1, length), device=self.device)
        self._settle()
        started = time.perf_counter()
        hidden_1SH = self.model(tokens_1S, dtype=self.torch_dtype).hidden_BSH
        self.model.logits(hidden_1SH[:, -1]).argmax(dim=-1).item()
        return time.perf_counter() - started

    @contextmanager
    def begun(
        self, prompts: Sequence[Sequence[int]], steps: int, is_sampled: bool, wants: Wants = NOTHING_MORE
    ) -> Iterator[tuple[Decoder, list[DecodedSequence]]]:
        """All prompts read, and some tokens known; no sequence ends before `steps` more. Their slots become free."""
        room = slot_length(max(map(len, prompts)), len(prompts), steps)
        decoder = self._decoder_for(len(prompts), room)
        temperature, top_p = (TEMPERATURE, TOP_P) if is_sampled else (0.0, 1.0)
        config = SamplingConfig(temperature, top_p=top_p, max_new_tokens=room)
        sequences = [decoder.admit(prompt, config, seed, wants=wants) for seed, prompt in enumerate(prompts)]
        while not all(sequence.continuation for sequence in sequences):
            decoder.step()
        _continue(decoder, WARM_STEPS * len(sequences))
        yield decoder, sequences
        assert all(sequence.finish_reason is None for sequence in sequences), "a sequence ended while it was timed"
        for sequence in sequences:
            decoder.cancel(sequence)
        self._settle()

    def _decoder_for(self, slots: int, length: int) -> Decoder:
        """With slots of that many tokens; the same as before where that suffices, so that nothing is captured again."""
        if self._decoder is None or slots != self._slots or length > self._length:
            self._decoder = None  # its memory is free before the next one takes its own
            vocabulary = self.model.config.vocab_size
            # An end token that no row of the head stands for is never made.
            self._decoder = Decoder(self.model, vocabulary, vocabulary, self.torch_dtype, slots, length)
            self._slots, self._length = slots, length
            if self.device.type == "cpu":  # on a GPU each number of sequences would be captured
                self._decoder.prepare()
        return self._decoder

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _continue(decoder: Decoder, tokens: int) -> int:
    """Steps until so many tokens are known: how many they are then."""
    known = 0
    while known < tokens:
        known += len(decoder.step())
    return known


def _cached(sequences: Sequence[DecodedSequence]) -> float:
    """Mean tokens of a sequence."""
    return sum(len(sequence.ids) for sequence in sequences) / len(sequences)
