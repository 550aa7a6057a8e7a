# shellcheck shell=bash
# Sourced by the templates: start one run on all nodes of the job; if asked, let it save and queue again.

export TOOLKIT_STOP_FILE=${TMPDIR:-/tmp}/toolkit-stop-$SLURM_JOB_ID
rm -f "$TOOLKIT_STOP_FILE"
asked=()
trap 'asked=(--asked); touch "$TOOLKIT_STOP_FILE"' USR2
export PATH="${VENV:-$TOOLKIT_ROOT/.venv}/bin:$PATH" PYTHONPATH="$TOOLKIT_ROOT${PYTHONPATH:+:$PYTHONPATH}"

TOOLKIT_LOG=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p') # `sweep status` names it
TOOLKIT_LOG=${TOOLKIT_LOG%%$'\n'*} # an array's last task bears the array's id, which stands for all
export TOOLKIT_LOG

toolkit() { python -m toolkit "$@"; }

is_asked() { ((${#asked[@]} > 0)); }

# wait_for COMMAND...: run it so that the trap is heard meanwhile; its exit code goes into $code
wait_for() {
    "$@" &
    local process=$!
    code=0
    while kill -0 "$process" 2>/dev/null; do
        wait "$process" && code=0 || code=$? # the trap interrupts it
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
    # since SLURM 22.05 srun does not take the job's value over: where tasks are bound, it may get one core
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
    wait_for srun --kill-on-bad-exit=1 "$TOOLKIT_ROOT/slurm/node.sh" "${@:2}"
    requeue_if_asked "$1"
}
