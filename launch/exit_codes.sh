# One outcome of the exit codes of a run's processes; for sourcing.
# shellcheck shell=bash

# outcome_of CODE...: finished, again (stopped by a signal or a lost peer: the same command
# continues), crashed, or mistake (of the user).
outcome_of() {
  local code result=finished
  for code; do
    case $code in
      0) ;;
      2)
        result=mistake
        break
        ;;
      75 | 130 | 143 | lost) [[ $result == crashed ]] || result=again ;;
      *) result=crashed ;;
    esac
  done
  echo "$result"
}
