#!/bin/bash
# Trains on several nodes with Slurm, and goes on after preemption and after the time limit:
#
#     sbatch examples/slurm.sh --preset 7b --data TOKENS --out runs/7b --fsdp_size 8
#
# All words go to `query-experts train`. Every node must see the tokens and the folder of --out. Set the numbers below to
# your cluster's, and activate the environment that holds query-experts before sbatch.
#SBATCH --job-name=query-experts
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@900

# SIGTERM saves a checkpoint after the step that follows, and ends the run. torchrun would wait for that for 30 s only.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=840
export OMP_NUM_THREADS=8

# Slurm tells this script 900 s before the time limit, and at preemption where PreemptParameters has send_user_signal;
# the script tells every torchrun, which tells its ranks. Preemption with a GraceTime tells torchrun itself.
stopped=no
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --cpus-per-task "$SLURM_CPUS_PER_TASK" torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$SLURM_GPUS_ON_NODE" --rdzv_id "$SLURM_JOB_ID" \
    --rdzv_backend c10d --rdzv_endpoint "$first_node:$((20000 + SLURM_JOB_ID % 10000))" \
    "$(command -v query-experts)" train "$@" &
wait $!
status=$?
while kill -0 $! 2>/dev/null; do # the trap interrupted wait
    wait $!
    status=$?
done

# the same command goes on from the checkpoint
if [ "$stopped" = yes ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
