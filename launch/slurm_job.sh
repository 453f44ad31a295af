# The rest of a job's script: launch/slurm.sh writes variables and exit_codes.sh before it.
# shellcheck shell=bash disable=SC2154
set -uo pipefail
export PYTHONUNBUFFERED=1
log() { echo "$(date '+%F %T') job $SLURM_JOB_ID: $*"; }

# Slurm signals this shell before the time limit (--signal), and it signals the trainers, so
# that they save. Only once: a second signal would end a trainer that is saving.
step="" terminated=""
terminate() {
  if [[ -z $terminated && -n $step ]]; then kill -TERM "$step"; fi
  terminated=1
}
trap terminate TERM

# srun returns the largest exit code only, so each process writes its own to a file. The
# trap keeps this shell alive while the trainer saves: Slurm signals both.
# shellcheck disable=SC2016
process='trap : TERM
"$@"
code=$?
echo "$code" >"$0.$SLURM_PROCID"
exit "$code"'

run_step() { # set `codes`
  local prefix=$logs/exit_code-$SLURM_JOB_ID code
  rm -f "$prefix".*
  # No kill on bad exit: one process that ends must not kill those that still save.
  srun --kill-on-bad-exit=0 --wait=600 --open-mode=append \
    --output="$logs/%x-%j-%t.log" bash -c "$process" "$prefix" "${command[@]}" &
  step=$!
  while true; do
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null || break # otherwise a signal has only ended the wait
  done
  step=""
  codes=$(cat "$prefix".* 2>/dev/null)
  if (($(wc -w <<<"$codes") < num_processes)); then codes+=" $code"; fi
  codes=$(tr '\n' ' ' <<<"$codes")
}

requeue() {
  local requeues=${SLURM_RESTART_COUNT:-0}
  # A cancelled job must not be requeued; Slurm itself requeues a preempted one.
  if ! scontrol show job "$SLURM_JOB_ID" | grep -q 'JobState=RUNNING'; then
    log "$1; Slurm ends the job"
    exit 75
  fi
  if ((requeues >= max_requeues)); then
    log "$1; gave up after $requeues requeues"
    exit 75
  fi
  log "$1; requeued, $((requeues + 1)) of $max_requeues"
  scontrol requeue "$SLURM_JOB_ID"
  exit
}

crashes=0
while true; do
  [[ -z $terminated ]] || requeue "the time limit is reached"
  run_step
  # shellcheck disable=SC2086
  case $(outcome_of $codes) in
    finished)
      log "finished"
      exit 0
      ;;
    mistake)
      log "the trainer rejected its config or data: see $logs"
      exit 2
      ;;
    again) requeue "saved (exit codes $codes)" ;;
  esac
  crashes=$((crashes + 1))
  log "crash $crashes of $max_crashes (exit codes $codes)"
  ((crashes < max_crashes)) || exit 1
  sleep $((backoff_secs << (crashes - 1)))
done
