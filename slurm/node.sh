#!/usr/bin/env bash
# Started by srun on each node of a job: one launcher. Its place among the nodes is known only here.
set -euo pipefail
processes=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
if [[ -z ${LAUNCH:-} ]]; then
    launch=gpu
    if ((processes > 1)); then launch=ddp; fi
    if ((SLURM_NNODES > 1)); then launch=ddp_nodes; fi
    LAUNCH=$TOOLKIT_ROOT/launch/$launch.yaml
fi
# not `accelerate launch`, which imports all of its other commands first, 0.8 s
exec python -m toolkit.reaper accelerate-launch --config_file "$LAUNCH" \
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
    --num_processes $((processes * SLURM_NNODES)) \
    --main_process_ip "$MASTER" --main_process_port "$MASTER_PORT" \
    "$TOOLKIT_ROOT/toolkit/train.py" "$@"
