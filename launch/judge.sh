# What the exit codes of a run's processes say together.
# shellcheck shell=bash

# judge CODE...: finished, again (the same command continues: stopped by a signal or a
# lost peer), crashed, or mistake (of the user).
judge() {
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
