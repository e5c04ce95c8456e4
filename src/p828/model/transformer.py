"""The decoder: embedding, layers of attention and experts, final norm, output head."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from p828.config import ModelConfig
from p828.model.attention import Attention, Visibility
from p828.model.experts import Experts, SharedExperts
from p828.model.kv_cache import KVCache, LayerCache
from p828.model.linear import Linear
from p828.model.norm import RMSNorm
from p828.model.rope import inverse_frequencies, rotary
from p828.model.router import Router, Routing, expert_loads, sequence_balance_loss, z_loss


class RouterStatistics(NamedTuple):
    """What the routers did in one forward pass, one entry a layer."""

    loads_LE: Tensor
    """int64: tokens that each expert received, padding left out."""
    balance_loss_L: Tensor
    """float32: sequence-wise auxiliary loss, summed over tokens."""
    z_loss_L: Tensor
    """float32: router z-loss, summed over tokens."""


class Output(NamedTuple):
    hidden_BSH: Tensor
    """After the final norm, in the dtype computed in; what the output head reads."""
    router: RouterStatistics


class MoE(nn.Module):
    """Routed experts plus shared experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SharedExperts(config) if config.n_shared_experts else None

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        routed_TH = self.experts(x_TH, routing)
        return routed_TH if self.shared_experts is None else routed_TH + self.shared_experts(x_TH)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config)
        self.gradient_checkpointing = False

    def forward(
        self,
        x_BSH: Tensor,
        angles: tuple[Tensor, Tensor],
        visibility: Visibility,
        counted_T: Tensor | None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x after attention and experts, and the layer's loads_E, balance loss and z-loss."""
        x_BSH = x_BSH + self._recomputed(self._attention, x_BSH, angles, visibility, cache)
        normed_TH = self.post_attention_layernorm(x_BSH).flatten(0, 1)
        # The routing is never recomputed: a top-k tie that fell the other way would mix two routings in one gradient.
        routing = self.mlp.gate(normed_TH)
        x_BSH = x_BSH + self._recomputed(self.mlp, normed_TH, routing).view_as(x_BSH)
        loads_E = expert_loads(routing.experts_TK, routing.scores_TE.shape[1], counted_T)
        return x_BSH, loads_E, sequence_balance_loss(routing, len(x_BSH)), z_loss(routing)

    def _attention(
        self, x_BSH: Tensor, angles: tuple[Tensor, Tensor], visibility: Visibility, cache: LayerCache | None
    ) -> Tensor:
        return self.self_attn(self.input_layernorm(x_BSH), angles, visibility, cache)

    def _recomputed(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Call `function`, keeping only its inputs for the backward pass if gradient checkpointing is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(function, *arguments, use_reentrant=False))
        return function(*arguments)


class Decoder(nn.Module):
    """Everything under Hugging Face's `model.` prefix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    frequencies: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self.register_buffer("frequencies", frequencies, persistent=False)

    @property
    def layers(self) -> list[Layer]:
        return [cast(Layer, layer) for layer in self.model.layers]

    @property
    def head_weight(self) -> Tensor:
        """(V, H), float32: the output head, or the embedding it is tied to."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Output:
        """Hidden states and router statistics of a batch, computed in `dtype`.

        `positions_BS` (int64) defaults to 0 … S−1. `document_ids_BS` (int) limits attention to a document when
        `mask_documents` is on; −1 marks padding, which no load counts. `cu_seqlens` (int32, `cumulative_lengths`) says
        the same for flash attention on CUDA; without it the host waits for the device. With a `cache`, the tokens join
        those it holds, and `positions_BS` says where.
        """
        if positions_BS is None:
            positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
        visibility = self._visibility(tokens_BS, positions_BS, document_ids_BS, cu_seqlens, cache, dtype)
        counted_T = None if document_ids_BS is None else document_ids_BS.flatten() >= 0
        angles = rotary(positions_BS, self.frequencies, self.config.rope_scaling.factor)
        x_BSH = self.model.embed_tokens(tokens_BS).to(dtype)
        statistics = []
        for index, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layer(index, positions_BS)
            x_BSH, *layer_statistics = layer(x_BSH, angles, visibility, counted_T, layer_cache)
            statistics.append(layer_statistics)
        router = RouterStatistics(*(torch.stack(values) for values in zip(*statistics, strict=True)))
        return Output(self.model.norm(x_BSH), router)

    def logits(self, hidden_H: Tensor) -> Tensor:
        """(…, H) to float32 (…, V)."""
        return (hidden_H @ self.head_weight.to(hidden_H.dtype).T).float()

    def _visibility(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        document_ids_BS: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: KVCache | None,
        dtype: torch.dtype,
    ) -> Visibility:
        if cache is not None:
            slots_C = torch.arange(cache.used, device=tokens_BS.device)
            return Visibility("reference", slots_C <= positions_BS[:, :, None], None)
        backend = self.config.attention_backend
        if backend == "auto":  # flash attention on CUDA takes 16-bit numbers only
            backend = "reference" if tokens_BS.is_cuda and dtype == torch.float32 else "flash"
        documents = document_ids_BS if self.config.mask_documents else None
        if backend == "flash" and tokens_BS.is_cuda:
            if documents is None:
                rows, length = tokens_BS.shape
                ends = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=tokens_BS.device)
                return Visibility(backend, None, ends)
            return Visibility(backend, None, cumulative_lengths(positions_BS) if cu_seqlens is None else cu_seqlens)
        if documents is None:
            return Visibility(backend, None, None)
        same_BSC = documents[:, :, None] == documents[:, None, :]
        return Visibility(backend, same_BSC.tril(), None)


def cumulative_lengths(positions_BS: Tensor) -> Tensor:
    """Where each document starts in the flattened tokens, and their number: int32 (documents + 1,), on any device."""
    starts = (positions_BS.flatten() == 0).nonzero()[:, 0]
    end = starts.new_tensor([positions_BS.numel()])
    return torch.cat((starts, end)).to(torch.int32)
