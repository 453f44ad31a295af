#!/usr/bin/env bash
# The commands that launch/tpu.sh runs on each worker of a TPU. One run at a time: it holds
# the chips.
#   worker.sh setup [BUCKET]        install the package into .venv, mount the bucket
#   worker.sh start ID [K=V ...] -- ARGUMENT...   train, detached from this shell
#   worker.sh state                 one line: running, exit CODE, stopped, lost or none
#   worker.sh logs LINES [follow]
#   worker.sh stop SECONDS          SIGTERM, and SIGKILL after SECONDS
#   worker.sh idle                  fail while a run is active
set -euo pipefail
script=$(cd "$(dirname "$0")" && pwd)/worker.sh
root=$(dirname "$(dirname "$script")")
run=$HOME/vjepa_jax_run # log, exit code and process of the run; survives a new setup
mkdir -p "$run"
boot=$(cat /proc/sys/kernel/random/boot_id)
host=$(hostname)

fail() {
  echo "$host: $2" >&2
  exit "$1"
}

# Set `session`, the leader of the last run's session, unless it started before a reboot.
read_session() {
  local booted=""
  session=""
  if [[ -f $run/session ]]; then
    read -r booted session <"$run/session"
    [[ $booted == "$boot" ]] || session=""
  fi
}

is_running() {
  read_session
  [[ -n $session && $(ps -o args= -p "$session" 2>/dev/null) == *"worker.sh supervise"* ]]
}

require_idle() {
  ! is_running || fail 3 "a run is active: end it with launch/tpu.sh stop"
}

# End processes that an earlier run left, and remove its lock: both hold the chips.
clear_leftovers() {
  local lock=${LIBTPU_LOCKFILE:-/tmp/libtpu_lockfile}
  read_session
  # While one of them lives, no new process gets the session's number.
  if [[ -n $session && $(ps -o stat= -p "$session") != [!Z]* ]] &&
    pkill -KILL -s "$session"; then
    echo "$host: ended processes of an earlier run" >&2
    for _ in {1..50}; do
      pgrep -s "$session" >/dev/null || break
      sleep 0.1
    done
  fi
  if [[ -e $lock ]]; then
    rm -f "$lock" 2>/dev/null || sudo -n rm -f "$lock"
    echo "$host: removed $lock of an earlier run" >&2
  fi
}

# The images for TPU v2 to v5 have Python 3.10; uv needs neither root nor apt's lock.
make_python() {
  export PYTHON=${PYTHON:-python3}
  if "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then return; fi
  if ! "$root/.venv/bin/python" -m pip --version >/dev/null 2>&1; then
    "$PYTHON" -m pip install --quiet --user uv
    "$PYTHON" -m uv venv --quiet --clear --seed --python 3.12 "$root/.venv"
  fi
  PYTHON=$root/.venv/bin/python
}

# Remove files of an earlier setup that are not in the new archive.
remove_stale_files() {
  tar -tzf "$HOME/vjepa_jax.tgz" | sort >"$run/files.new"
  if [[ -f $run/files ]]; then
    comm -23 "$run/files" "$run/files.new" | while IFS= read -r name; do
      rm -f -- "$root/$name"
    done
  fi
  mv "$run/files.new" "$run/files"
}

mount_bucket() {
  local bucket=$1 folder=$root/gcs/$1
  mkdir -p "$folder"
  if mountpoint -q "$folder"; then return; fi
  command -v gcsfuse >/dev/null ||
    fail 3 "gcsfuse, which mounts gs://$bucket, is missing: install it, see launch/README.md"
  # Files do not change during a run: look each one up only once.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=-1 --stat-cache-max-size-mb=-1 \
    --type-cache-max-size-mb=-1 --kernel-list-cache-ttl-secs=-1 -o ro \
    "$bucket" "$folder"
}

setup() {
  require_idle
  remove_stale_files
  # Without it, logging out may remove the shared memory of running processes.
  sudo -n loginctl enable-linger "$(id -un)" 2>/dev/null || true
  make_python
  # shellcheck source=launch/setup.sh
  . "$root/launch/setup.sh" tpu,gcs,report
  if [[ -n ${1-} ]]; then
    echo "$1" >"$run/bucket"
    mount_bucket "$1"
  fi
  echo "$host: set up"
}

start() {
  local id=$1
  shift
  # A start may be repeated because another worker was unreachable.
  if [[ -f $run/id && $(<"$run/id") == "$id" ]]; then
    echo "$host: already started"
    return
  fi
  require_idle
  [[ -x $root/.venv/bin/python ]] || fail 3 "not set up: run launch/tpu.sh setup"
  clear_leftovers
  if [[ -f $run/bucket ]]; then mount_bucket "$(<"$run/bucket")"; fi
  rm -f "$run/exit_code" "$run/stopped" "$run/session"
  cd "$root"
  setsid bash "$script" supervise "$@" </dev/null >>"$run/train.log" 2>&1 &
  for _ in {1..600}; do
    if [[ -s $run/session ]]; then
      echo "$id" >"$run/id"
      echo "$host: started"
      return
    fi
    sleep 0.1
  done
  fail 1 "the run did not start within 60 s"
}

# Lead the session of the run, and write its exit code to a file.
supervise() {
  trap : TERM HUP # it must outlive the trainer
  echo "$boot $$" >"$run/session.new"
  mv "$run/session.new" "$run/session"
  local -a variables=()
  while [[ $1 != -- ]]; do
    variables+=("$1")
    shift
  done
  shift
  echo "=== $(date -u +%FT%TZ) $host"
  local code=0
  env PYTHONUNBUFFERED=1 "${variables[@]}" \
    "$root/.venv/bin/python" -m vjepa_jax.train "$@" || code=$?
  echo "=== $(date -u +%FT%TZ) $host: exit code $code"
  echo "$code" >"$run/exit_code.new"
  mv "$run/exit_code.new" "$run/exit_code"
}

state() {
  local word
  if is_running; then
    word=running
  elif [[ -f $run/exit_code && $(<"$run/exit_code") == 0 ]]; then
    word="exit 0"
  elif [[ -f $run/stopped ]]; then
    word=stopped
  elif [[ -f $run/exit_code ]]; then
    word="exit $(<"$run/exit_code")"
  elif [[ -f $run/id ]]; then
    word=lost # killed with its supervisor, or the machine was restarted
  else
    word=none
  fi
  echo "worker $host $word"
}

stop() {
  local seconds=$1
  if ! is_running; then
    echo "$host: nothing to stop"
    return
  fi
  touch "$run/stopped"
  # Only the trainer: its decoding workers continue while it saves.
  pkill -TERM -P "$session" || true
  local end=$((SECONDS + seconds))
  while is_running && ((SECONDS < end)); do sleep 0.2; done
  if is_running; then
    pkill -KILL -s "$session" || true
    echo "$host: killed, since it did not end within $seconds s"
  else
    echo "$host: stopped"
  fi
}

logs() {
  [[ -f $run/train.log ]] || fail 1 "no log: nothing was started"
  if [[ ${2-} == follow ]]; then
    exec tail -n "$1" -F "$run/train.log"
  fi
  # One write per line, so that lines of several workers do not mix; only the last state
  # of a progress bar.
  tail -n "$1" "$run/train.log" | sed -u "s/.*\\r//; s/^/[$host] /"
}

case ${1-} in
  setup | start | supervise | state | logs | stop) "$@" ;;
  idle) require_idle ;;
  *) fail 2 "unknown command '${1-}'" ;;
esac
