"""Steps on a CPU: the host knows tokens, places and experts as it goes, and starts few operations for each.

T counts the sequences of a step, C tokens of the cache, X the key heads of all sequences.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from p828.config import ModelConfig
from p828.inference.decode.cache import SlotCache
from p828.inference.decode.cpu_layers import CpuLayer, LayerCache, Places
from p828.inference.decode.cpu_token import TokenStep, product
from p828.inference.decode.rows import Rows, drawing_of
from p828.inference.decode.sequence import DecodedSequence
from p828.inference.decode.steps import Flight, PlainSteps, wants_probabilities
from p828.inference.decode.weights import decode_weights
from p828.inference.sampling import likeliest_tokens
from p828.kernels.decode.cpu import MOST_COMPARED, Matrix, Norm, matrix_of
from p828.model.rope import rotary
from p828.model.transformer import Transformer

WORTH_PACKING = 1024  # greedy steps that gain about as much time by a packed head as packing takes


class CpuSteps(PlainSteps):
    """float32 on a CPU, with weights in float32 or bfloat16 as the model stores them."""

    def __init__(self, model: Transformer, cache: SlotCache, rows: Rows, vocab_size: int, dtype: torch.dtype) -> None:
        super().__init__(model, cache, rows, vocab_size, dtype)
        self.config: ModelConfig = model.config
        weights = decode_weights(model, vocab_size, model.head_weight.dtype)
        self.embedding_VH, self.head = weights.embedding_VH, matrix_of(weights.head_VH, is_head=True)
        self.norm = Norm(weights.norm_H, self.config.rms_norm_eps)
        self.layers = [
            CpuLayer(layer, self.config, LayerCache(keys_SGCD, values_SGCD))
            for layer, keys_SGCD, values_SGCD in zip(weights.layers, cache.keys, cache.values, strict=True)
        ]
        angles = rotary(torch.arange(cache.max_length)[None], model.frequencies, self.config.rope_scaling.factor)
        cos_C1X, sin_C1X = (angle.squeeze(0) for angle in angles)
        self.cos_C1D = torch.cat((cos_C1X, cos_C1X), dim=-1)
        self.sin_C1D = torch.cat((-sin_C1X, sin_C1X), dim=-1)
        self.of_one = TokenStep(self.layers, self.norm, self.config, self.cos_C1D, self.sin_C1D)
        self._greedy_steps = 0

    def prepare(self) -> None:
        """Pack the head, of which a few sequences need parts."""
        if isinstance(self.head, Matrix):
            _ = self.head.in_parts, self.head.largest_row

    @torch.inference_mode()
    def continue_(
        self, sequences: Sequence[DecodedSequence], lengths: Sequence[int], may_be_several: bool
    ) -> Sequence[Flight]:
        slots = [sequence.slot for sequence in sequences]
        hidden_TH, experts_LTK = self._hidden(slots, [length - 1 for length in lengths])
        wants_experts = any(sequence.wants.experts for sequence in sequences)
        experts = torch.stack(experts_LTK) if wants_experts else None
        drawing = drawing_of(sequences)
        if drawing.draws or wants_probabilities(sequences):
            logits_TV = self.logits(hidden_TH)
            token_T = self.rows.choose(logits_TV, torch.tensor(slots), drawing)
            return [self.flight(sequences, token_T, logits_TV, experts)]
        token_T = self._likeliest(hidden_TH)
        self.rows.add(token_T.numpy(), slots, list(lengths))
        return [self.flight(sequences, token_T, None, experts)]

    def _hidden(self, slots: list[int], positions: list[int]) -> tuple[Tensor, list[Tensor]]:
        """What the head multiplies, (T, H), and each layer's routed experts, (T, K)."""
        newest_T = torch.from_numpy(self.rows.newest_of(slots))
        x_TH = self.embedding_VH[newest_T].float()
        if len(slots) == 1:
            return self.of_one.hidden(x_TH, slots[0], positions[0])
        places = self._places(slots, positions)
        experts_LTK = [layer.add_(x_TH, places) for layer in self.layers]
        return self.norm(x_TH), experts_LTK

    def _likeliest(self, hidden_TH: Tensor) -> Tensor:
        """Each row's likeliest token; −1 where a logit is no finite number."""
        if isinstance(self.head, Matrix) and len(hidden_TH) <= MOST_COMPARED:
            self._greedy_steps += 1
            is_worth_it = self.head.is_packed or self._greedy_steps >= WORTH_PACKING
            token_T = self.head.largest_row(hidden_TH) if is_worth_it and self.head.largest_row is not None else None
            if token_T is not None:
                return token_T
        return likeliest_tokens(self.logits(hidden_TH))

    @np.errstate(over="ignore", invalid="ignore")  # of a model that has diverged, which the logits tell of
    def logits(self, hidden_TH: Tensor) -> Tensor:
        if len(hidden_TH) == 1:
            return torch.from_numpy(product(self.head, hidden_TH.numpy()[0]))[None]
        return self.head(hidden_TH)

    def _places(self, slots: list[int], positions: list[int]) -> Places:
        groups, context = self.config.num_key_value_heads, self.cache.max_length
        slots_T1, positions_T = torch.tensor(slots)[:, None], torch.tensor(positions)
        rows_TG = (slots_T1 * groups + torch.arange(groups)) * context + positions_T[:, None]
        mask_X1C = None
        if slots == list(range(slots[0], slots[0] + len(slots))):
            hidden_TC = torch.arange(max(positions) + 1) > positions_T[:, None]
            mask_TC = torch.zeros(hidden_TC.shape).masked_fill_(hidden_TC, float("-inf"))
            mask_X1C = mask_TC.repeat_interleave(groups, dim=0)[:, None]
        return Places(
            slots, positions, rows_TG.flatten(), self.cos_C1D[positions_T], self.sin_C1D[positions_T], mask_X1C
        )
