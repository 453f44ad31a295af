#!/usr/bin/env bash
# Create, use and delete a TPU pod: see launch/README.md and --help.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/arguments.sh"
. "$here/env.sh"
. "$here/exit_codes.sh"
. "$here/gcloud.sh"
. "$here/babysit.sh"

usage() {
  cat <<'HELP'
launch/tpu.sh COMMAND NAME [--flag=value ...] [-- argument ...]

  create NAME    request a TPU, by default in the queue, and wait until it is ready
      --accelerator-type=T --runtime-version=V --num-slices=N --spot --reserved
      --no-queue: a plain TPU VM, which fails at once without capacity
  setup NAME     copy the files that git tracks to all workers and install the package
      --bucket=B: mount the bucket B on each worker, read only, at gcs/B
  run NAME [--env=KEY=VALUE ...] -- --config=... --workdir=gs://...
                 start the trainer on all workers, detached from this machine
  babysit NAME   create, setup and run; repeat after preemptions until it is finished
      the flags of create, setup and run; --delete-on-success
  status NAME    the TPU, and the run on each worker
  logs NAME      [--slice=N] [--worker=N] [--lines=N] [--follow]
  ssh NAME       [--slice=N] [--worker=N] [-- command argument ...]
  stop NAME      stop the run: SIGTERM, on which it saves; SIGKILL after TPU_STOP_SECS
  delete NAME    [--yes] delete the TPU and its disks

  all commands: --project=P --zone=Z --no-queue
  --dry-run      print the gcloud calls instead of making them

launch/env.sh lists the defaults; environment variables override them.
Exit codes: 0 done; 1 gave up; 2 mistake in the command or its config; 75 not finished:
the same command continues.
HELP
}

# ---------------------------------------------------------------------------- commands
require_create_flags() {
  [[ -n $TPU_ACCELERATOR_TYPE ]] ||
    die "give --accelerator-type, e.g. --accelerator-type=v5litepod-16"
  if [[ -n $TPU_NO_QUEUE ]] && ((TPU_NUM_SLICES > 1)); then
    die "--no-queue creates one slice: remove it, or --num-slices=$TPU_NUM_SLICES"
  fi
}

# Wait until the TPU is ready, after requesting it if needed; fail if it is refused.
bring_up() {
  local printed=""
  while true; do
    attempt look || return 1
    if [[ $detail != "$printed" && -z $TPU_DRY_RUN ]]; then
      log "TPU $name: $detail"
      printed=$detail
    fi
    case $tpu in
      ready) return ;;
      absent) attempt request || return 1 ;;
      gone) return 1 ;;
    esac
    sleep "$TPU_POLL_SECS"
  done
}

create() {
  require_create_flags
  if [[ -n $TPU_DRY_RUN ]]; then request; fi
  if ! bring_up; then
    log "TPU $name: gave up${detail:+ ($detail)}; fix: launch/tpu.sh delete $name"
    exit 1
  fi
}

# One archive per command, so that a recreated TPU gets the same files as the first one.
pack() {
  archive=vjepa_jax.tgz
  if [[ -n $TPU_DRY_RUN ]]; then
    echo "git ls-files -z | tar -czf $archive --null -T -"
    return
  fi
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  archive=$folder/vjepa_jax.tgz
  cd "$here/.."
  git ls-files -z | while IFS= read -r -d '' file; do
    if [[ -e $file || -L $file ]]; then printf '%s\0' "$file"; fi
  done | COPYFILE_DISABLE=1 tar -czf "$archive" --null -T -
}

setup_node() {
  local script=vjepa_jax/launch/worker.sh
  tpu_ssh "$1" all "if [ -e $script ]; then bash $script idle; fi" &&
    tpu_scp "$1" "$archive" vjepa_jax.tgz &&
    tpu_ssh "$1" all "mkdir -p vjepa_jax && tar -xzf vjepa_jax.tgz -C vjepa_jax &&\
 $(worker_command setup ${TPU_BUCKET:+"$TPU_BUCKET"})"
}

set_up() { attempt each_slice setup_node; }

require_trainer_flags() {
  local workdir pair
  for pair in ${repeated[@]+"${repeated[@]}"}; do
    [[ $pair =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die "--env=$pair is not KEY=VALUE"
  done
  ((${#rest[@]})) || die "give the trainer's flags after --: -- --config=... --workdir=..."
  workdir=$(trainer_flag workdir "${rest[@]}")
  [[ $workdir == gs://?* ]] ||
    die "--workdir=$workdir is lost with the workers: give a folder on gs://"
}

# With the id, repeating a start for one worker does not affect the others. The count
# distinguishes the runs of babysit that fail within one second.
starts=0
start_run() {
  local id
  starts=$((starts + 1))
  id=$(date +%s)-$$-$starts
  [[ -z $TPU_DRY_RUN ]] || id=ID
  attempt on_all "$(worker_command start "$id" \
    ${repeated[@]+"${repeated[@]}"} -- "${rest[@]}")"
}

run() {
  require_ready
  start_run || exit 1
}

status() {
  attempt look || exit 1
  if [[ -n $TPU_DRY_RUN ]]; then
    on_all "$(worker_command state)"
    return
  fi
  echo "TPU $name: $detail"
  if [[ $tpu == ready ]]; then
    echo "slices: ${nodes[*]}; workers: $num_workers"
    on_all "$(worker_command state)" | grep '^worker ' | sort
  fi
}

node_of_slice() { # sets `node`
  ((TPU_SLICE < ${#nodes[@]})) || die "--slice=$TPU_SLICE: $name has ${#nodes[@]}, from 0"
  node=${nodes[$TPU_SLICE]}
}

logs() {
  require_ready
  if [[ -n $TPU_FOLLOW ]]; then
    node_of_slice
    tpu_ssh "$node" "${TPU_WORKER:-0}" "$(worker_command logs "$TPU_LINES" follow)"
  elif [[ -n $TPU_WORKER ]]; then
    node_of_slice
    tpu_ssh "$node" "$TPU_WORKER" "$(worker_command logs "$TPU_LINES")"
  else
    on_all "$(worker_command logs "$TPU_LINES")"
  fi
}

open_shell() {
  require_ready
  node_of_slice
  if ((${#rest[@]})); then
    tpu_ssh "$node" "${TPU_WORKER:-0}" "$(quote "${rest[@]}")"
  elif [[ -n $TPU_DRY_RUN ]]; then
    tpu_ssh "$node" "${TPU_WORKER:-0}"
  else
    local -a flags
    read -ra flags <<<"$TPU_SSH_FLAGS"
    exec gcloud compute tpus tpu-vm ssh "$node" ${where[@]+"${where[@]}"} \
      "--worker=${TPU_WORKER:-0}" ${flags[@]+"${flags[@]}"}
  fi
}

delete() {
  if [[ -z $TPU_YES && -z $TPU_DRY_RUN ]]; then
    read -r -p "delete TPU $name and the disks of its workers? [y/N] " answer || true
    [[ ${answer-} == [yY]* ]] || die "nothing deleted: answer y, or give --yes"
  fi
  attempt remove || exit 1
}

# ---------------------------------------------------------------------------- arguments
command=${1-}
place_flags="project zone"
create_flags="accelerator-type runtime-version num-slices"
case $command in
  create) values=$create_flags switches="spot reserved" repeats="" ;;
  setup) values=bucket switches="" repeats="" ;;
  run) values="" switches="" repeats="env" ;;
  babysit)
    values="$create_flags bucket"
    switches="spot reserved delete-on-success"
    repeats="env"
    ;;
  status | stop) values="" switches="" repeats="" ;;
  logs) values="slice worker lines" switches=follow repeats="" ;;
  ssh) values="slice worker" switches="" repeats="" ;;
  delete) values="" switches=yes repeats="" ;;
  -h | --help | help)
    usage
    exit 0
    ;;
  "") die "give a command: see $0 --help" ;;
  *) die "unknown command '$command': see $0 --help" ;;
esac
shift
# Flags of one command, which the environment does not set.
TPU_DRY_RUN="" TPU_YES="" TPU_FOLLOW="" TPU_DELETE_ON_SUCCESS=""
TPU_SLICE=0 TPU_WORKER="" TPU_LINES=100
parse TPU "$place_flags $values" "no-queue dry-run $switches" "$repeats" "$@"
((${#words[@]})) || die "give the TPU's name: $0 $command NAME"
((${#words[@]} == 1)) || die "give one name, not '${words[*]}'; other arguments go after --"
name=${words[0]}
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
  die "'$name' is not a TPU name: use lower-case letters, digits and -"
require_number --num-slices "$TPU_NUM_SLICES"
require_number --slice "$TPU_SLICE"
require_number --lines "$TPU_LINES"
[[ $TPU_WORKER =~ ^([0-9]*|all)$ ]] || die "--worker must be a number or all, got '$TPU_WORKER'"
case $command in
  run | babysit | ssh) ;;
  *) ((!${#rest[@]})) || die "$command takes no arguments after --" ;;
esac
place
case $command in
  ssh) open_shell ;;
  setup)
    require_ready
    pack
    set_up || exit 1
    ;;
  run)
    require_trainer_flags
    run
    ;;
  stop)
    require_ready
    on_all "$(worker_command stop "$TPU_STOP_SECS")"
    ;;
  babysit)
    require_create_flags
    require_trainer_flags
    babysit
    ;;
  *) "$command" ;;
esac
