#!/usr/bin/env bash
# Train on every GPU of this machine, or of several:
#
#   bash launch_distributed.sh CONFIG [--section.key VALUE ...]
#
# GPUS sets how many of this machine's. For several machines run it on each, with the same NNODES and MASTER_ADDR (the
# first one's name) and a NODE_RANK of its own from 0 on; `srun bash launch_distributed.sh ...` with one task a node
# takes all three from SLURM. PYTHON names the interpreter that has p828.
set -euo pipefail
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
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
exec "${PYTHON:-python3}" -m torch.distributed.run "${where[@]}" --nproc-per-node "$gpus" \
    -m p828 train "$@" --engine deepspeed
