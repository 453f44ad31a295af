# The loop of `tpu.sh babysit`: restart a run until it is finished, on new TPUs if needed.
# shellcheck shell=bash disable=SC2154

# Set `replies` and `running` (numbers of workers), `stopped` (1: on request) and `codes`
# (exit codes of the workers whose trainer has ended; `lost` where there is none).
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

# Set `outcome` when the run ends: the result of outcome_of, stopped (by tpu.sh stop),
# preempted, deleted (by another command), broken (some workers stay unreachable) or
# unreachable (gcloud or all workers do not answer).
watch_run() {
  local unreachable=0 straggling_since=""
  while true; do
    outcome=unreachable
    attempt look || return 0
    case $tpu in
      gone) outcome=preempted ;;
      absent | deleting) outcome=deleted ;;
    esac
    [[ $outcome == unreachable ]] || return 0
    if [[ $tpu == ready ]]; then
      poll_run
      if ((replies < num_workers || replies == 0)); then
        unreachable=$((unreachable + 1))
        log "$replies of $num_workers workers answer"
        if ((unreachable >= TPU_MAX_ATTEMPTS)); then
          ((replies == 0)) || outcome=broken
          return 0
        fi
      else
        unreachable=0
        # shellcheck disable=SC2086
        outcome=$(outcome_of $codes)
        [[ -z $stopped ]] || outcome=stopped
        ((running > 0)) || return 0
        if ((running == num_workers)); then
          straggling_since=""
        elif [[ -z $straggling_since ]]; then
          straggling_since=$SECONDS
          log "$running of $num_workers workers still run; exit codes of the others:$codes"
        elif ((SECONDS - straggling_since >= TPU_STRAGGLER_SECS)); then
          on_all "$(worker_command stop "$TPU_STOP_SECS")" || true
          [[ $outcome != finished ]] || outcome=again
          return 0
        fi
      fi
    fi
    sleep "$TPU_POLL_SECS"
  done
}

# Count a failure, unless it turns out to be a preemption.
count_failure() { # WHAT
  log "$1: failure $((failures + 1)) of $TPU_MAX_FAILURES in a row"
  backoff $((failures + 1))
  attempt look || true
  if [[ $tpu != gone || $detail == FAILED ]]; then failures=$((failures + 1)); fi
}

recreate() {
  log "TPU $name: $1; deleting it, to create it again"
  attempt remove || give_up "the TPU could not be deleted"
  needs_setup=1 was_ready=""
}

give_up() {
  log "gave up: $1"
  exit 1
}

leave_deleted() {
  log "TPU $name was deleted by another command; run babysit again to create a new one"
  exit 75
}

print_calls() {
  look
  request
  pack
  set_up
  start_run
  on_all "$(worker_command state)"
  if [[ -n $TPU_DELETE_ON_SUCCESS ]]; then remove; fi
}

babysit() {
  local failures=0 needs_setup=1 was_ready="" outcome began
  if [[ -n $TPU_DRY_RUN ]]; then
    print_calls
    return
  fi
  trap 'log "babysit ends; the run continues until tpu.sh stop"; exit 130' INT TERM
  pack
  while true; do
    ((failures < TPU_MAX_FAILURES)) || give_up "$failures failures in a row"
    attempt look || give_up "gcloud does not return the state of $name"
    case $tpu in
      gone) recreate "$detail" ;;
      absent | deleting) [[ -z $was_ready ]] || leave_deleted ;;
    esac
    if ! bring_up; then
      count_failure "no TPU"
      continue
    fi
    was_ready=1
    poll_run
    if ((running == 0)); then
      if [[ -n $needs_setup ]] && ! set_up; then
        count_failure "set-up"
        continue
      fi
      needs_setup=""
      if ! start_run; then
        needs_setup=1
        count_failure "start"
        continue
      fi
      log "started on $num_workers workers"
    fi
    began=$SECONDS
    watch_run
    if ((SECONDS - began >= TPU_HEALTHY_SECS)); then failures=0; fi
    case $outcome in
      finished)
        log "finished"
        [[ -z $TPU_DELETE_ON_SUCCESS ]] || attempt remove || exit 1
        exit 0
        ;;
      mistake)
        on_all "$(worker_command logs 20)" >&2 || true
        log "the trainer rejected its config or data: fix it, then run babysit again"
        exit 2
        ;;
      stopped)
        log "stopped on request; run babysit again to continue"
        exit 75
        ;;
      deleted) leave_deleted ;;
      unreachable)
        give_up "$name is unreachable; its run continues; run babysit again to watch it"
        ;;
      preempted) log "TPU $name: preempted ($detail)" ;;
      broken)
        count_failure "some workers are unreachable"
        recreate "broken"
        ;;
      *)
        on_all "$(worker_command logs 20)" >&2 || true
        count_failure "run: $outcome (exit codes$codes)"
        ;;
    esac
  done
}
