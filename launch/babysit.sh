# The loop of `tpu.sh babysit`: a run is brought to its end whatever happens to the TPU.
# shellcheck shell=bash disable=SC2154

# Sets `replies` and `running` (numbers of workers), `stopped` (1: on request) and
# `codes` (exit codes of the workers whose trainer has ended; `lost` where it left none).
poll_run() {
  local tag word code
  replies=0 running=0 stopped="" codes=""
  while read -r tag _ word code; do
    [[ $tag == worker ]] || continue
    replies=$((replies + 1))
    case $word in
      running) running=$((running + 1)) ;;
      stopped) stopped=1 ;;
      exit) codes+=" $code" ;;
      *) codes+=" lost" ;;
    esac
  done < <(on_all "$(worker_command state)" 2>/dev/null)
}

# Sets `verdict` when there is one: what judge says, stopped (by tpu.sh stop), preempted,
# deleted (by somebody else), broken (some workers are out of reach for good) or blind (gcloud is no help).
watch_run() {
  local unreachable=0 straggling_since=""
  while true; do
    verdict=blind
    attempt look || return 0
    case $tpu in
      gone) verdict=preempted ;;
      absent | deleting) verdict=deleted ;;
    esac
    [[ $verdict == blind ]] || return 0
    if [[ $tpu == ready ]]; then
      poll_run
      if ((replies < num_workers || replies == 0)); then
        unreachable=$((unreachable + 1))
        say "$replies of $num_workers workers answer"
        if ((unreachable >= TPU_MAX_ATTEMPTS)); then
          ((replies == 0)) || verdict=broken
          return 0
        fi
      else
        unreachable=0
        # shellcheck disable=SC2086
        verdict=$(judge $codes)
        [[ -z $stopped ]] || verdict=stopped
        ((running > 0)) || return 0
        if ((running == num_workers)); then
          straggling_since=""
        elif [[ -z $straggling_since ]]; then
          straggling_since=$SECONDS
          say "$running of $num_workers workers still run, the others: exit codes$codes"
        elif ((SECONDS - straggling_since >= TPU_STRAGGLER_SECS)); then
          on_all "$(worker_command stop "$TPU_STOP_SECS")" || true
          [[ $verdict != finished ]] || verdict=again
          return 0
        fi
      fi
    fi
    sleep "$TPU_POLL_SECS"
  done
}

# A failure does not count where it was a preemption that had not shown yet.
note_failure() { # WHAT
  say "$1: failure $((failures + 1)), of $TPU_MAX_FAILURES in a row"
  backoff $((failures + 1))
  attempt look || true
  if [[ $tpu != gone || $detail == FAILED ]]; then failures=$((failures + 1)); fi
}

make_anew() {
  say "TPU $name: $1; deleting what is left of it, to make it anew"
  attempt remove || give_up "the TPU could not be deleted"
  needs_setup=1 was_ready=""
}

give_up() {
  say "gave up: $1"
  exit 1
}

leave_deleted() {
  say "TPU $name was deleted by somebody else; babysit again to make another"
  exit 75
}

rehearse() {
  look
  request
  pack
  set_up
  start_run
  on_all "$(worker_command state)"
  if [[ -n $TPU_DELETE_ON_SUCCESS ]]; then remove; fi
}

babysit() {
  local failures=0 needs_setup=1 was_ready="" verdict began
  if [[ -n $TPU_DRY_RUN ]]; then
    rehearse
    return
  fi
  trap 'say "babysit ends; what runs goes on until tpu.sh stop"; exit 130' INT TERM
  pack
  while true; do
    ((failures < TPU_MAX_FAILURES)) || give_up "$failures failures in a row"
    attempt look || give_up "gcloud does not tell the state of $name"
    case $tpu in
      gone) make_anew "$detail" ;;
      absent | deleting) [[ -z $was_ready ]] || leave_deleted ;;
    esac
    if ! bring_up; then
      note_failure "no TPU"
      continue
    fi
    was_ready=1
    poll_run
    if ((running == 0)); then
      if [[ -n $needs_setup ]] && ! set_up; then
        note_failure "set-up"
        continue
      fi
      needs_setup=""
      if ! start_run; then
        needs_setup=1
        note_failure "start"
        continue
      fi
      say "started on $num_workers workers"
    fi
    began=$SECONDS
    watch_run
    if ((SECONDS - began >= TPU_HEALTHY_SECS)); then failures=0; fi
    case $verdict in
      finished)
        say "finished"
        [[ -z $TPU_DELETE_ON_SUCCESS ]] || attempt remove || exit 1
        exit 0
        ;;
      mistake)
        on_all "$(worker_command logs 20)" >&2 || true
        say "the trainer refused its config or data: mend it, then run babysit again"
        exit 2
        ;;
      stopped)
        say "stopped on request; babysit again to continue"
        exit 75
        ;;
      deleted) leave_deleted ;;
      blind)
        give_up "$name is out of reach; what runs there goes on, babysit again to watch"
        ;;
      preempted) say "TPU $name: preempted ($detail)" ;;
      broken)
        note_failure "some workers are out of reach"
        make_anew "broken"
        ;;
      *)
        on_all "$(worker_command logs 20)" >&2 || true
        note_failure "run $verdict (exit codes$codes)"
        ;;
    esac
  done
}
