# The rest of a job's script: launch/slurm.sh writes variables and judge.sh before it.
# shellcheck shell=bash disable=SC2154
set -uo pipefail
export PYTHONUNBUFFERED=1
say() { echo "$(date '+%F %T') job $SLURM_JOB_ID: $*"; }

# Slurm tells this shell before time ends (--signal); the trainers must hear of it in order
# to save. Once only: a second signal ends a trainer that is saving.
step="" terminated=""
terminate() {
  if [[ -z $terminated && -n $step ]]; then kill -TERM "$step"; fi
  terminated=1
}
trap terminate TERM

# srun tells the largest exit code only, so each process leaves its own in a file. The trap
# keeps this shell alive while the trainer saves: Slurm signals both.
# shellcheck disable=SC2016
process='trap : TERM
"$@"
code=$?
echo "$code" >"$0.$SLURM_PROCID"
exit "$code"'

run_step() { # sets `codes`
  local prefix=$logs/exit_code-$SLURM_JOB_ID code
  rm -f "$prefix".*
  # A process that ends must not take along those that still save: no kill on bad exit.
  srun --kill-on-bad-exit=0 --wait=600 --open-mode=append \
    --output="$logs/%x-%j-%t.log" bash -c "$process" "$prefix" "${command[@]}" &
  step=$!
  while true; do
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null || break # else a signal has ended the wait only
  done
  step=""
  codes=$(cat "$prefix".* 2>/dev/null)
  if (($(wc -w <<<"$codes") < num_processes)); then codes+=" $code"; fi
  codes=$(tr '\n' ' ' <<<"$codes")
}

requeue() {
  local requeues=${SLURM_RESTART_COUNT:-0}
  # A job that is being cancelled must not come back; one that Slurm preempts will.
  if ! scontrol show job "$SLURM_JOB_ID" | grep -q 'JobState=RUNNING'; then
    say "$1; Slurm ends the job"
    exit 75
  fi
  if ((requeues >= max_requeues)); then
    say "$1; gave up after $requeues requeues"
    exit 75
  fi
  say "$1; queued anew, $((requeues + 1)) of $max_requeues"
  scontrol requeue "$SLURM_JOB_ID"
  exit
}

crashes=0
while true; do
  [[ -z $terminated ]] || requeue "time is over"
  run_step
  # shellcheck disable=SC2086
  case $(judge $codes) in
    finished)
      say "finished"
      exit 0
      ;;
    mistake)
      say "the trainer refused its config or data: see $logs"
      exit 2
      ;;
    again) requeue "saved (exit codes $codes)" ;;
  esac
  crashes=$((crashes + 1))
  say "crash $crashes of $max_crashes (exit codes $codes)"
  ((crashes < max_crashes)) || exit 1
  sleep $((backoff_secs << (crashes - 1)))
done
