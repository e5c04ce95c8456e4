"""The decoder: embedding, layers of attention and experts, final norm, output head."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from p828.config import ModelConfig
from p828.model.attention import Attention, AttentionMask
from p828.model.backend import attention_backend
from p828.model.experts import Experts, SharedExperts, TokenPermutation
from p828.model.linear import Linear
from p828.model.norm import ResidualNorm
from p828.model.rope import inverse_frequencies, rotary
from p828.model.router import Router, score_entropy, sequence_balance_loss, z_loss


class LayerStatistics(NamedTuple):
    """What one router did; the fields of `RouterStatistics` without their layers."""

    loads_E: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    entropy: Tensor


class RouterStatistics(NamedTuple):
    """What the routers did in one forward pass, one entry a layer."""

    loads_LE: Tensor
    """int64: tokens that each expert received, padding left out."""
    balance_loss_L: Tensor
    """float32: sequence-wise auxiliary loss, summed over valid tokens; 0 for a layer without `auxiliary_losses`."""
    z_loss_L: Tensor
    """float32: router z-loss, summed over valid tokens; 0 likewise."""
    entropy_L: Tensor
    """float32: `score_entropy`, summed over the tokens that loads count."""


class LayerInputs(NamedTuple):
    """What a forward pass gives every layer beside the residual stream; `Layer.forward` says what each is."""

    angles: tuple[Tensor, Tensor]
    mask: AttentionMask
    valid_token_T: Tensor | None
    has_target_T: Tensor | None


class Output(NamedTuple):
    hidden_BSH: Tensor
    """After the final norm, in the dtype computed in; what the output head reads."""
    router: RouterStatistics
    boundaries: list["Boundary"]
    """Where the autograd graph was detached, from the first layers on."""


class Boundary(NamedTuple):
    """A detach point between two layers, where a backward pass in several segments stops and goes on."""

    before: tuple[Tensor, Tensor]
    """x and delta, produced by the layers below."""
    after: tuple[Tensor, Tensor]
    """The leaf copies of them that the layers above consume."""


class MoE(nn.Module):
    """Routed experts plus shared experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SharedExperts(config) if config.n_shared_experts else None

    def forward(self, x_TH: Tensor, weights_TK: Tensor, permutation: TokenPermutation) -> Tensor:
        routed_TH = self.experts(x_TH, weights_TK, permutation)
        return routed_TH if self.shared_experts is None else routed_TH + self.shared_experts(x_TH)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = ResidualNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = ResidualNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config)
        self.gradient_checkpointing = False
        self.auxiliary_losses = True

    def forward(
        self,
        x_BSH: Tensor,
        delta_BSH: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: AttentionMask,
        valid_token_T: Tensor | None,
        has_target_T: Tensor | None,
    ) -> tuple[Tensor, Tensor, LayerStatistics]:
        """The residual stream after attention, what the experts add to it, and statistics.

        `delta_BSH` is what the layer below adds to its residual stream `x_BSH`. The residual add is deferred: the next
        norm fuses it, so a layer returns (residual, delta) instead of their sum. Loads count the tokens in
        `valid_token_T` (bool), auxiliary losses those in `has_target_T` (bool); None stands for all.
        """
        x_BSH, normed_BSH = self.input_layernorm(x_BSH, delta_BSH)
        attended_BSH = self._recomputed(self.self_attn, normed_BSH, angles, mask)
        x_BSH, normed_BSH = self.post_attention_layernorm(x_BSH, attended_BSH)
        normed_TH = normed_BSH.flatten(0, 1)
        # The routing is never recomputed: a top-k tie that fell the other way would mix two routings in one gradient.
        routing = self.mlp.gate(normed_TH)
        permutation = self.mlp.experts.permutation(normed_TH, routing.experts_TK, valid_token_T)
        mixed_BSH = self._recomputed(self.mlp, normed_TH, routing.weights_TK, permutation).view_as(x_BSH)
        if self.auxiliary_losses:
            losses = sequence_balance_loss(routing, len(x_BSH), has_target_T), z_loss(routing, has_target_T)
        else:  # a compiled layer would compute the gradients of unused ones too
            losses = routing.scores_TE.new_zeros(()), routing.scores_TE.new_zeros(())
        entropy = score_entropy(routing, valid_token_T)
        return x_BSH, mixed_BSH, LayerStatistics(permutation.loads_E, *losses, entropy)

    def _recomputed(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Call `function`, keeping only its inputs for the backward pass if gradient checkpointing is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(function, *arguments, use_reentrant=False))
        return function(*arguments)


class Decoder(nn.Module):
    """Everything under Hugging Face's `model.` prefix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Without numbers, as all other weights: PyTorch would draw some, which `model.init` draws anew.
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False
        )
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = ResidualNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    frequencies: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        self.weights_stay = True
        """False where a layer's weights are there only while its modules run, so that nothing may read them else."""
        self.register_buffer("frequencies", None, persistent=False)
        self.reset_buffers()

    def reset_buffers(self, device: torch.device | str | None = None) -> None:
        """Rotary frequencies and the routers' balance bias as they begin, in float32."""
        config = self.config
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self.frequencies = frequencies.to(device or torch.get_default_device())
        for layer in self.layers:
            layer.mlp.gate.e_score_correction_bias = torch.zeros(config.n_routed_experts, device=device)

    @property
    def layers(self) -> list[Layer]:
        return [cast(Layer, layer) for layer in self.model.layers]

    @property
    def head_weight(self) -> Tensor:
        """(V, H): the output head, or the embedding it is tied to."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        embedded_BSH: Tensor | None = None,
        detach_before: Collection[int] = (),
        valid_BS: Tensor | None = None,
    ) -> Output:
        """Hidden states and router statistics of a batch, computed in `dtype`.

        `positions_BS` (int64) defaults to 0 … S−1. `document_ids_BS` (int) limits attention to a document when
        `mask_documents` is on; −1 marks padding, which no load counts. `embedded_BSH` is the
        result of `embed`, for a caller that wants its gradient. `detach_before` lists the layers before which the
        autograd graph is detached, for a backward pass in several segments. `valid_BS` (bool) marks the tokens that
        have a target: auxiliary losses are sums over these, as the loss is. It defaults to those that are not padding.
        """
        inputs = self.layer_inputs(tokens_BS, positions_BS, document_ids_BS, dtype, valid_BS)
        x_BSH = self.embed(tokens_BS, dtype) if embedded_BSH is None else embedded_BSH
        delta_BSH = torch.zeros_like(x_BSH)
        statistics, boundaries = [], []
        for index, layer in enumerate(self.layers):
            if index in detach_before:
                boundaries.append(Boundary((x_BSH, delta_BSH), (_leaf(x_BSH), _leaf(delta_BSH))))
                x_BSH, delta_BSH = boundaries[-1].after
            x_BSH, delta_BSH, layer_statistics = layer(x_BSH, delta_BSH, *inputs)
            statistics.append(layer_statistics)
        _, normed_BSH = self.model.norm(x_BSH, delta_BSH)
        return Output(normed_BSH, stacked(statistics), boundaries)

    def layer_inputs(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor | None,
        document_ids_BS: Tensor | None,
        dtype: torch.dtype,
        valid_BS: Tensor | None,
    ) -> LayerInputs:
        """What all layers are given for a batch; arguments as `forward` has them."""
        if positions_BS is None:
            positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
        mask = self._attention_mask(tokens_BS, document_ids_BS, dtype)
        valid_token_T = None if document_ids_BS is None else document_ids_BS.flatten() >= 0
        has_target_T = valid_token_T if valid_BS is None else valid_BS.flatten()
        angles = rotary(positions_BS, self.frequencies, self.config.rope_scaling.factor)
        return LayerInputs(angles, mask, valid_token_T, has_target_T)

    def embed(self, tokens_BS: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, S) token ids to (B, S, H) in `dtype`."""
        return cast(Tensor, self.model.embed_tokens(tokens_BS)).to(dtype)

    def logits(self, hidden_H: Tensor) -> Tensor:
        """(…, H) to float32 (…, V)."""
        return (hidden_H @ self.head_weight.to(hidden_H.dtype).T).float()

    def _attention_mask(self, tokens_BS: Tensor, document_ids_BS: Tensor | None, dtype: torch.dtype) -> AttentionMask:
        backend = attention_backend(self.config, tokens_BS.device, dtype)
        documents = document_ids_BS if self.config.mask_documents else None
        if backend == "flash_triton":
            sequences = torch.zeros_like(tokens_BS) if documents is None else documents
            return AttentionMask(backend, None, *document_bounds(sequences))
        if documents is None:
            return AttentionMask(backend)
        same_BSC = documents[:, :, None] == documents[:, None, :]
        return AttentionMask(backend, same_BSC.tril())


def stacked(statistics: Sequence[LayerStatistics]) -> RouterStatistics:
    """Those of layers, in their order, as tensors with one entry a layer."""
    return RouterStatistics(*(torch.stack(values) for values in zip(*statistics, strict=True)))


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def document_bounds(documents_BS: Tensor) -> tuple[Tensor, Tensor]:
    """The first token of each token's document, and the one past its last: int32 (T,) each.

    A document ends with its sequence, or where the id changes. The host does not wait for the device.
    """
    is_first_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    is_first_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    token_BS = torch.arange(documents_BS.numel(), dtype=torch.int32, device=documents_BS.device).view_as(documents_BS)
    start_BS = token_BS.where(is_first_BS, 0).cummax(1).values
    row_end_B1 = token_BS[:, -1:] + 1
    next_start_BS = torch.cat((token_BS.where(is_first_BS, row_end_B1)[:, 1:], row_end_B1), dim=1)
    end_BS = next_start_BS.flip(1).cummin(1).values.flip(1)
    return start_BS.flatten(), end_BS.flatten()
