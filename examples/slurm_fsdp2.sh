#!/bin/bash
# Instruction tuning with LISA under FSDP2 on two nodes of eight GPUs. Guide: docs/cluster.md
#
#   sbatch examples/slurm_fsdp2.sh /shared/model /shared/pairs.jsonl /shared/runs/lisa
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8       # one task per GPU: as many as trainer.devices
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=SIGUSR1@120      # two minutes before the limit: Lightning saves and submits the job again
set -euo pipefail

MODEL=${1:?model folder or hub id} PAIRS=${2:?training data} RUN=${3:?folder for checkpoints, seen by all nodes}

export NCCL_DEBUG=WARN
srun lightning-peft fit --config configs/recipes/many_nodes.yaml \
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices 8 \
    --model.model_name_or_path "$MODEL" --data.train_path "$PAIRS" --trainer.default_root_dir "$RUN"
