# Defaults of launch/tpu.sh and launch/slurm.sh; sourced by both.
# The environment overrides these, a flag overrides both: --zone sets TPU_ZONE.
# shellcheck shell=bash disable=SC2034

# ------------------------------------------------------------------------------- TPU
: "${TPU_PROJECT:=}"          # Google Cloud project; empty: the one of `gcloud config`
: "${TPU_ZONE:=}"             # where the quota is, e.g. us-west4-a; empty: gcloud's
: "${TPU_ACCELERATOR_TYPE:=}" # e.g. v5litepod-16 (16 chips), v5p-32 (32 cores, 16 chips)
: "${TPU_RUNTIME_VERSION:=}"  # image of the VMs; empty: the one of the accelerator
: "${TPU_NUM_SLICES:=1}"      # more than one: a multi-slice job
: "${TPU_SPOT:=}"             # 1: cheaper, may be preempted at any time
: "${TPU_RESERVED:=}"         # 1: use the project's reservation
: "${TPU_NO_QUEUE:=}"         # 1: a plain TPU VM, which fails without capacity
: "${TPU_CREATE_FLAGS:=}"     # further flags of gcloud's create, e.g. "--network=N --labels=a=b"
: "${TPU_SSH_FLAGS:=}"        # further flags of gcloud's ssh and scp, e.g. --internal-ip
: "${TPU_BUCKET:=}"           # bucket mounted on each worker at gcs/BUCKET, read only

: "${TPU_POLL_SECS:=60}"        # between two polls of a TPU or a run
: "${TPU_BACKOFF_SECS:=30}"     # before the second attempt; doubles up to 10 minutes
: "${TPU_MAX_ATTEMPTS:=5}"      # of one gcloud call
: "${TPU_MAX_FAILURES:=5}"      # consecutive failures of a run, without preemptions
: "${TPU_HEALTHY_SECS:=1800}"   # a run of this length resets the count of failures
: "${TPU_STRAGGLER_SECS:=600}"  # for the other workers to end, after one has ended
: "${TPU_STOP_SECS:=180}"       # from SIGTERM to SIGKILL: time to save a checkpoint

# ----------------------------------------------------------------------------- Slurm
: "${SLURM_RUN_NODES:=1}"
: "${SLURM_RUN_GPUS_PER_NODE:=8}"  # also the number of processes: one per GPU
: "${SLURM_RUN_CPUS_PER_GPU:=8}"   # cores that decode videos
: "${SLURM_RUN_TIME:=24:00:00}"    # of one allocation; at its end the job is requeued
: "${SLURM_RUN_PARTITION:=}"       # empty: the cluster's default
: "${SLURM_RUN_ACCOUNT:=}"         # empty: yours
: "${SLURM_RUN_JOB_NAME:=vjepa_jax}"
: "${SLURM_RUN_LOGS:=runs/slurm}"  # folder of the logs, one file per process
: "${SLURM_RUN_MAX_REQUEUES:=100}" # preemptions and time limits, in total
: "${SLURM_RUN_MAX_CRASHES:=3}"    # in one allocation
: "${SLURM_RUN_BACKOFF_SECS:=60}"  # after a crash; doubles
