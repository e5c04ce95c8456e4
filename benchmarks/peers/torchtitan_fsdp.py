"""torchtitan 0.3.0's Qwen3 MoE under PyTorch's FSDP2, sharded and trained as its trainer does it.

Every block, the embedding and the head are a unit; parameters are gathered in bfloat16 and gradients reduced in float32
after each micro-batch. Attention and loss are those of `torchtitan_model`; FSDP's hooks allow no CUDA graph.
"""

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.config import CompileConfig
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.utils import clip_grad_norm_
from torchtitan.tools.utils import set_default_dtype

from p828.config import Config
from p828.data.batch import Batch
from peers.step import adamw
from peers.torchtitan_model import model_config, set_up


class FsdpTraining:
    """What `benchmarks/scaling.py` asks of an engine. All ranks make one."""

    def __init__(self, config: Config, device: torch.device, ranks: int, reshards: bool) -> None:
        """`reshards`: parameters are let go of after a layer's forward pass, as at ZeRO 3; else kept, as at ZeRO 2."""
        set_up()
        self.device, self.config = device, config
        compile_config = CompileConfig(enable=device.type == "cuda")
        with torch.device("meta"), set_default_dtype(torch.float32):
            self.model = model_config(config).build()
        if compile_config.enable:
            apply_compile(self.model, compile_config=compile_config, parallel_dims=SimpleNamespace(tp_enabled=False))
        self._shard(ranks, reshards)
        self.model.to_empty(device=device)
        with torch.no_grad():
            self.model.init_weights(buffer_device=None)
        self.model.train()
        self.loss = ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config()).build(compile_config=compile_config)
        self.loss.set_lm_head(self.model.lm_head)
        self.model._skip_lm_head = True  # the loss applies it, a chunk at a time
        self.optimizer = adamw(self.model, config.optimizer)
        self._losses: list[Tensor] = []

    def forward_backward(self, batch: Batch, num_targets: int) -> None:
        batch = batch.to(self.device)
        targets = torch.tensor(num_targets, device=self.device)
        loss, _ = self.loss(self.model(batch.tokens_BS), batch.targets_BS, targets)
        loss.backward()
        self._losses.append(loss.detach())

    def step(self, learning_rate: float) -> float:
        """This rank's part of the loss."""
        clip_grad_norm_(list(self.model.parameters()), self.config.optimizer.max_grad_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.stack(self._losses).sum().item()
        self._losses.clear()
        return loss

    def _shard(self, ranks: int, reshards: bool) -> None:
        from torchtitan.distributed.fsdp import apply_fsdp_to_decoder

        model, mesh = self.model, init_device_mesh(self.device.type, (ranks,), mesh_dim_names=("fsdp",))
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        # In PyTorch 2.11 a unit of norm and head does not survive that the loss calls the head alone: it is one itself.
        head = model.lm_head
        fully_shard(head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        head.set_gradient_divide_factor(1.0)
        model.lm_head = None
        apply_fsdp_to_decoder(
            model,
            mesh,
            param_dtype=torch.bfloat16,
            reduce_dtype=torch.float32,
            pp_enabled=False,
            reshard_after_forward_policy="default" if reshards else "never",
        )
        model.lm_head = head
