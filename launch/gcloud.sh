# Calls of gcloud for one TPU, and its state; sourced by tpu.sh. Reads `name` and the TPU_ variables of env.sh.
# shellcheck shell=bash disable=SC2154

tpu="" detail="" found="" nodes=() num_workers=0 # set by look()

log() { echo "$(date '+%F %T') $*" >&2; }

call() {
  if [[ -n $TPU_DRY_RUN ]]; then
    quote gcloud "$@"
    echo
  else
    gcloud "$@" </dev/null
  fi
}

backoff() { # FAILURES so far
  local seconds=$((TPU_BACKOFF_SECS << ($1 < 10 ? $1 - 1 : 9)))
  ((seconds <= 600)) || seconds=600
  log "next attempt in $seconds s"
  sleep "$seconds"
}

attempt() {
  local tries=1 code
  while true; do
    code=0
    "$@" || code=$?
    case $code in
      0 | 2 | 3) return "$code" ;; # done, or rejected: the same call would be rejected again
    esac
    if ((tries >= TPU_MAX_ATTEMPTS)); then return "$code"; fi
    log "attempt $tries of $TPU_MAX_ATTEMPTS failed with exit code $code"
    backoff "$tries"
    tries=$((tries + 1))
  done
}

place() { # sets `where`
  where=()
  [[ -z $TPU_PROJECT ]] || where+=("--project=$TPU_PROJECT")
  [[ -z $TPU_ZONE ]] || where+=("--zone=$TPU_ZONE")
}

tpu_ssh() { # NODE WORKER [COMMAND]
  local -a flags
  read -ra flags <<<"$TPU_SSH_FLAGS"
  call compute tpus tpu-vm ssh "$1" ${where[@]+"${where[@]}"} "--worker=$2" --quiet \
    ${flags[@]+"${flags[@]}"} ${3:+"--command=$3"}
}

tpu_scp() { # NODE FILE TARGET
  local -a flags
  read -ra flags <<<"$TPU_SSH_FLAGS"
  call compute tpus tpu-vm scp "$2" "$1:$3" ${where[@]+"${where[@]}"} --worker=all --quiet \
    ${flags[@]+"${flags[@]}"}
}

# Run a function for all slices in parallel; fail if it fails for one.
each_slice() { # FUNCTION ARGUMENT...: gets the node's name as first argument
  local function=$1 node pid code=0
  local -a pids=()
  shift
  for node in "${nodes[@]}"; do
    if [[ -n $TPU_DRY_RUN ]]; then
      "$function" "$node" "$@"
    else
      "$function" "$node" "$@" &
      pids+=($!)
    fi
  done
  for pid in ${pids[@]+"${pids[@]}"}; do
    wait "$pid" || code=$?
  done
  return "$code"
}

on_node() { tpu_ssh "$1" all "$2"; }
on_all() { each_slice on_node "$1"; }

worker_command() { echo "bash vjepa_jax/launch/worker.sh $(quote "$@")"; }

# ---------------------------------------------------------------- create and delete
runtime_version() {
  case $TPU_ACCELERATOR_TYPE in
    v5litepod*) echo v2-alpha-tpuv5-lite ;;
    v5p*) echo v2-alpha-tpuv5 ;;
    v6e*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

request() {
  local -a flags
  local version=${TPU_RUNTIME_VERSION:-$(runtime_version)}
  read -ra flags <<<"$TPU_CREATE_FLAGS"
  [[ -z $TPU_SPOT ]] || flags+=(--spot)
  [[ -z $TPU_RESERVED ]] || flags+=(--reserved)
  if [[ -n $TPU_NO_QUEUE ]]; then
    call compute tpus tpu-vm create "$name" ${where[@]+"${where[@]}"} \
      "--accelerator-type=$TPU_ACCELERATOR_TYPE" "--version=$version" \
      ${flags[@]+"${flags[@]}"}
    return
  fi
  local -a slices=("--node-id=$name")
  if ((TPU_NUM_SLICES > 1)); then
    slices=("--node-count=$TPU_NUM_SLICES" "--node-prefix=$name")
  fi
  call compute tpus queued-resources create "$name" ${where[@]+"${where[@]}"} \
    "--accelerator-type=$TPU_ACCELERATOR_TYPE" "--runtime-version=$version" \
    "${slices[@]}" ${flags[@]+"${flags[@]}"}
}

remove() {
  if [[ -n $TPU_NO_QUEUE ]]; then
    call compute tpus tpu-vm delete "$name" ${where[@]+"${where[@]}"} --quiet
  else
    call compute tpus queued-resources delete "$name" ${where[@]+"${where[@]}"} \
      --force --quiet
  fi
}

# --------------------------------------------------------------------- state of the TPU
# Set `found` to gcloud's output, or fail; an unknown name sets it to ABSENT.
describe() { # KIND NAME FORMAT
  local log code=0
  if [[ -n $TPU_DRY_RUN ]]; then
    call compute tpus "$1" describe "$2" ${where[@]+"${where[@]}"} "--format=$3"
    return
  fi
  log=$(mktemp)
  found=$(call compute tpus "$1" describe "$2" ${where[@]+"${where[@]}"} \
    "--format=$3" 2>"$log") || code=$?
  if ((code)) && grep -q NOT_FOUND "$log"; then
    found=ABSENT code=0
  elif ((code)); then
    cat "$log" >&2
  fi
  rm -f "$log"
  return "$code"
}

plan_nodes() { # the names that `create` will give
  local slice
  nodes=("$name")
  if ((TPU_NUM_SLICES > 1)); then
    nodes=()
    for ((slice = 0; slice < TPU_NUM_SLICES; slice++)); do
      nodes+=("$name-$slice")
    done
  fi
}

# Set `tpu` (absent, waiting, ready, gone or deleting), `detail` (gcloud's name of the
# state), `nodes` (a name per slice) and `num_workers`.
look() {
  local node list endpoints
  num_workers=0
  nodes=("$name")
  if [[ -n $TPU_DRY_RUN ]]; then plan_nodes; fi
  if [[ -z $TPU_NO_QUEUE ]]; then
    describe queued-resources "$name" 'value(state.state,tpu.nodeSpec[].nodeId)' ||
      return 1
    if [[ -z $TPU_DRY_RUN ]]; then
      read -r detail list <<<"$found" || true
      case $detail in
        ABSENT) tpu=absent ;;
        ACTIVE) tpu=ready ;;
        SUSPENDING | SUSPENDED | FAILED) tpu=gone ;;
        DELETING) tpu=deleting ;;
        *) tpu=waiting ;;
      esac
      [[ $tpu == ready ]] || return 0
      if [[ -n $list ]]; then IFS=';' read -ra nodes <<<"$list"; else plan_nodes; fi
    fi
  fi
  # A slice may be preempted while its queued resource is still active.
  for node in "${nodes[@]}"; do
    describe tpu-vm "$node" 'value(state,networkEndpoints[].ipAddress)' || return 1
    if [[ -n $TPU_DRY_RUN ]]; then continue; fi
    read -r detail list <<<"$found" || true
    case $detail in
      READY)
        tpu=ready
        IFS=';' read -ra endpoints <<<"$list"
        num_workers=$((num_workers + ${#endpoints[@]}))
        ;;
      ABSENT)
        tpu=absent
        [[ -n $TPU_NO_QUEUE ]] || tpu=gone
        return
        ;;
      CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING)
        tpu=waiting
        return
        ;;
      DELETING)
        tpu=deleting
        return
        ;;
      *)
        tpu=gone
        return
        ;;
    esac
  done
  if [[ -n $TPU_DRY_RUN ]]; then tpu=ready; fi
}

require_ready() {
  attempt look || exit 1
  [[ $tpu != absent ]] || die "there is no TPU $name: create it with launch/tpu.sh create"
  [[ $tpu == ready ]] || die "TPU $name is not ready ($detail): see launch/tpu.sh status"
}
