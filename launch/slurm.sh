#!/usr/bin/env bash
# Submit a run to a Slurm cluster of GPUs: see launch/README.md, and --help.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/arguments.sh"
. "$here/env.sh"

usage() {
  cat <<'HELP'
launch/slurm.sh [--flag=value ...] -- --config=FILE.py --workdir=DIR [...]

  --nodes=N --gpus-per-node=N    one process per GPU
  --cpus-per-gpu=N               cores that decode videos
  --time=T --partition=P --account=A --job-name=J
  --sbatch=FLAG                  any other flag of sbatch, e.g. --sbatch=--constraint=h100
  --logs=DIR                     one file per process, and one of the job
  --max-requeues=N --max-crashes=N
  --dry-run                      print the job's script instead of submitting it

The job saves and is requeued when it is preempted or reaches its time limit, and ends
when the run is finished. Run this from the folder to which --config and --workdir are
relative; DIR and the package must be on a file system that all nodes share.
launch/env.sh lists the defaults (SLURM_RUN_...); environment variables override them.
HELP
}

SLURM_RUN_DRY_RUN=""
numbers="nodes gpus-per-node cpus-per-gpu max-requeues max-crashes"
parse SLURM_RUN "$numbers time partition account job-name logs" dry-run sbatch "$@"
((!${#words[@]})) || die "unexpected '${words[0]}': the trainer's flags go after --"
((${#rest[@]})) || die "give the trainer's flags after --: -- --config=... --workdir=..."
[[ -n $(trainer_flag workdir "${rest[@]}") ]] || die "give --workdir=DIR after --"
require_number --nodes "$SLURM_RUN_NODES"
require_number --gpus-per-node "$SLURM_RUN_GPUS_PER_NODE"
require_number --cpus-per-gpu "$SLURM_RUN_CPUS_PER_GPU"
require_number --max-requeues "$SLURM_RUN_MAX_REQUEUES"
require_number --max-crashes "$SLURM_RUN_MAX_CRASHES"
python=${PYTHON:-$(dirname "$here")/.venv/bin/python}
[[ -x $python ]] || die "no $python: run bash -c '. launch/setup.sh cuda,gcs' first"

num_processes=$((SLURM_RUN_NODES * SLURM_RUN_GPUS_PER_NODE))

# Not --gpus-per-task: each process must see all GPUs of its node, since jax selects one of
# them by SLURM_LOCALID.
directives() {
  echo "--job-name=$SLURM_RUN_JOB_NAME"
  echo "--nodes=$SLURM_RUN_NODES"
  echo "--ntasks=$num_processes"
  echo "--ntasks-per-node=$SLURM_RUN_GPUS_PER_NODE"
  echo "--gpus-per-node=$SLURM_RUN_GPUS_PER_NODE"
  echo "--cpus-per-task=$SLURM_RUN_CPUS_PER_GPU"
  echo "--time=$SLURM_RUN_TIME"
  [[ -z $SLURM_RUN_PARTITION ]] || echo "--partition=$SLURM_RUN_PARTITION"
  [[ -z $SLURM_RUN_ACCOUNT ]] || echo "--account=$SLURM_RUN_ACCOUNT"
  echo "--output=$SLURM_RUN_LOGS/%x-%j.log"
  echo "--open-mode=append"
  echo "--requeue"
  echo "--signal=B:TERM@300"
  ((!${#repeated[@]})) || printf '%s\n' "${repeated[@]}"
}

script() {
  local directive
  echo '#!/usr/bin/env bash'
  directives | while IFS= read -r directive; do
    echo "#SBATCH $(quote "$directive")"
  done
  cat <<SCRIPT
command=($(quote "$python" -m vjepa_jax.train "${rest[@]}"))
logs=$(quote "$SLURM_RUN_LOGS")
num_processes=$num_processes
export SRUN_CPUS_PER_TASK=$SLURM_RUN_CPUS_PER_GPU # srun does not take it from the job
max_requeues=$SLURM_RUN_MAX_REQUEUES
max_crashes=$SLURM_RUN_MAX_CRASHES
backoff_secs=$SLURM_RUN_BACKOFF_SECS
SCRIPT
  cat "$here/exit_codes.sh" "$here/slurm_job.sh"
}

if [[ -n $SLURM_RUN_DRY_RUN ]]; then
  script
else
  mkdir -p "$SLURM_RUN_LOGS"
  script | sbatch
fi
