#!/usr/bin/env bash
# Train on every GPU of this machine, or of several:
#
#   bash launch_distributed.sh CONFIG [--section.key VALUE ...]
#
# p828 chooses the engine and the ZeRO stage that fits, or takes what CONFIG and flags say.
# GPUS sets how many of those that PyTorch sees. For several machines run it on each, with the same NNODES and
# MASTER_ADDR (the first one's name) and a NODE_RANK of its own from 0 on; `srun bash launch_distributed.sh ...` with one
# task a node takes all three from SLURM. PYTHON names the interpreter that has p828; without it, it is that of the .venv
# beside this file, which make installs, else python3.
set -euo pipefail
own=$(dirname "${BASH_SOURCE[0]}")/.venv/bin/python
[ -x "$own" ] || own=python3
python=${PYTHON:-$own}
if [ $# -eq 0 ] || [[ $1 == -* ]]; then
    echo "usage: bash launch_distributed.sh CONFIG [--section.key VALUE ...]" >&2
    exit 2
fi
gpus=${GPUS:-$("$python" -c "import torch; print(torch.cuda.device_count())")}
if [ "$gpus" -lt 1 ]; then
    echo "launch_distributed.sh: PyTorch sees no GPU here; GPUS sets how many processes to start" >&2
    exit 2
fi
nodes=${NNODES:-${SLURM_NNODES:-1}}
if [ "$nodes" -gt 1 ]; then
    where=(
        --nnodes "$nodes" --node-rank "${NODE_RANK:-${SLURM_NODEID:?give NODE_RANK}}"
        --master-addr "${MASTER_ADDR:-$(scontrol show hostnames "${SLURM_JOB_NODELIST:?give MASTER_ADDR}" | head -n 1)}"
        --master-port "${MASTER_PORT:-29500}"
    )
else
    where=(--standalone)
fi
exec "$python" -m p828.distributed.torchrun "${where[@]}" --nproc-per-node "$gpus" -m p828 train "$@"
