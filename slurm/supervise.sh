# shellcheck shell=bash
# Sourced by the templates: start a command on the job's nodes; if asked, let it save and queue again.

# sbatch hands over the login node's TMPDIR, which may not be there on this node
[[ -w ${TMPDIR:-/tmp} ]] || export TMPDIR=/tmp
export TOOLKIT_STOP_FILE=${TMPDIR:-/tmp}/toolkit-stop-$SLURM_JOB_ID
rm -f "$TOOLKIT_STOP_FILE"
asked=()
interrupted=0
code=1 # of a job that is asked to stop before its first command
ask_to_stop() {
    asked=(--asked)
    interrupted=1
    # on a full disk, too, this script has to outlive the run
    touch "$TOOLKIT_STOP_FILE" || echo "warning: the run is not asked to stop" >&2 || true
}
trap ask_to_stop USR2
export PATH="${VENV:-$TOOLKIT_ROOT/.venv}/bin:$PATH" PYTHONPATH="$TOOLKIT_ROOT${PYTHONPATH:+:$PYTHONPATH}"
# sbatch --export holds for srun too, which would not hand over what is exported here
export SLURM_EXPORT_ENV=ALL
# since SLURM 22.05 srun does not take the job's value over: where tasks are bound, it may get one core
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

TOOLKIT_LOG=$(readlink /proc/$$/fd/1) || true # where this job prints to: `sweep status` names it
export TOOLKIT_LOG

toolkit() { python -m toolkit "$@"; }

is_asked() { ((${#asked[@]} > 0)); }

# wait_for COMMAND...: run it so that the trap is heard meanwhile; its exit code goes into $code
wait_for() {
    "$@" &
    local process=$!
    interrupted=1
    while ((interrupted)); do # the trap ends a `wait` early; bash keeps the code of what has ended
        interrupted=0
        wait "$process" && code=0 || code=$?
    done
}

# requeue_if_asked [RUN_FOLDER]
requeue_if_asked() {
    rm -f "$TOOLKIT_STOP_FILE"
    toolkit sweep requeue "$@" "${asked[@]}" --max_requeues "$MAX_REQUEUES" || exit "$code"
}

# supervise RUN_FOLDER FLAG...
supervise() {
    MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000)) # array tasks on one node never meet
    export MASTER MASTER_PORT
    wait_for srun --kill-on-bad-exit=1 "$TOOLKIT_ROOT/slurm/node.sh" "${@:2}"
    requeue_if_asked "$1"
}
