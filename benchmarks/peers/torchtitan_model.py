"""torchtitan 0.3.0's Qwen3 MoE of a configuration's sizes, in its fastest setting on one GPU.

That is: plain causal attention by cuDNN, every block compiled, the loss in chunks of the sequence and compiled, and
forward and backward captured in a CUDA graph. It has sigmoid routing, q/k norm and a shared expert here; it has no
sinks, and no document mask in this setting. In bfloat16 throughout, or with float32 weights under autocast.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.fsdp
from torch import Tensor
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.config import CompileConfig
from torchtitan.distributed import utils as distributed_utils
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.cudagraph import wrap_with_cuda_graph
from torchtitan.models.common import CosSinRoPE, Embedding, Linear, token_dispatcher
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.config_utils import make_ffn_config
from torchtitan.tools.utils import set_default_dtype

from p828.bench.systems import System
from p828.config import Config
from peers.interface import Peer
from peers.routing import GivenTorchtitanRouter


def build(system: System, device: torch.device, given_experts: list[Tensor]) -> Peer:
    has_float32_weights = system.options.get("has_float32_weights", False)
    is_compiled = system.options.get("is_compiled", True)
    set_up()
    with torch.device("meta"), set_default_dtype(torch.float32 if has_float32_weights else torch.bfloat16):
        model = model_config(system.config).build()
    compile_config = CompileConfig(enable=is_compiled)
    if is_compiled:
        apply_compile(model, compile_config=compile_config, parallel_dims=SimpleNamespace(tp_enabled=False))
    model.to_empty(device=device)
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    for layer, experts_TK in zip(model.layers.values(), given_experts, strict=False):
        layer.moe.router = GivenTorchtitanRouter(layer.moe.router, experts_TK.to(device))
    model.train()
    loss = ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config()).build(compile_config=compile_config)
    loss.set_lm_head(model.lm_head)
    model._skip_lm_head = True  # the loss applies it, a chunk at a time

    def forward_backward(inputs: Tensor, labels: Tensor, num_targets: Tensor, _: dict[str, Any]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=has_float32_weights):
            value, _ = loss(model(inputs), labels, num_targets)
        value.backward()
        return value.detach()

    run = wrap_with_cuda_graph(forward_backward)  # which leaves it as it is on a CPU

    def captured(tokens_BS: Tensor, targets_BS: Tensor, num_targets: Tensor) -> Tensor:
        return run(tokens_BS, targets_BS, num_targets, {})

    return Peer(model, captured, has_cuda_graph=True)


def set_up() -> None:
    """What is asked of torchtitan as a whole."""
    distributed_utils.set_spmd_backend("partial_dtensor")  # no types of sharding are to be checked
    # Its own is deterministic and slower; p828's time is without `train.deterministic`, too.
    token_dispatcher.deterministic_scatter_add = lambda out, index, src: out.scatter_add(0, index, src)


def model_config(config: Config) -> Any:
    """The model's configuration in torchtitan's terms."""
    if not hasattr(torch.distributed.fsdp, "DataParallelMeshDims"):
        # Named, and not used on one device, by its modules; PyTorch has it since 2.12.
        torch.distributed.fsdp.DataParallelMeshDims = type("DataParallelMeshDims", (), {})
    from torchtitan.models import qwen3

    sizes = config.model
    layers = qwen3._build_qwen3_moe_layers(
        n_layers=sizes.num_hidden_layers,
        dim=sizes.hidden_size,
        n_heads=sizes.num_attention_heads,
        n_kv_heads=sizes.num_key_value_heads,
        head_dim=sizes.head_dim,
        moe_hidden_dim=sizes.moe_intermediate_size,
        num_experts=sizes.n_routed_experts,
        top_k=sizes.num_experts_per_tok,
        fuse_qkv=True,
        attn_backend="flex",
        moe_comm_backend="standard",
        rope=CosSinRoPE.Config(dim=sizes.head_dim, max_seq_len=config.data.sequence_length, theta=sizes.rope_theta),
    )
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
        router = layer.moe.router
        router.score_func, router.route_norm = "sigmoid", sizes.norm_topk_prob
        router.route_scale = sizes.routed_scaling_factor
        layer.moe.shared_experts = make_ffn_config(
            dim=sizes.hidden_size,
            hidden_dim=sizes.n_shared_experts * sizes.moe_intermediate_size,
            w1_param_init=qwen3._LINEAR_INIT,
            w2w3_param_init=qwen3._LINEAR_INIT,
        )
    return qwen3.Qwen3Model.Config(
        vocab_size=sizes.vocab_size,
        dim=sizes.hidden_size,
        norm=qwen3._qwen3_norm(sizes.hidden_size),
        layers=layers,
        enable_weight_tying=sizes.tie_word_embeddings,
        tok_embeddings=Embedding.Config(
            num_embeddings=sizes.vocab_size, embedding_dim=sizes.hidden_size, param_init=qwen3._EMBEDDING_INIT
        ),
        lm_head=Linear.Config(
            in_features=sizes.hidden_size, out_features=sizes.vocab_size, param_init=qwen3._LINEAR_INIT
        ),
    )
