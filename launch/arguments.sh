# Errors, flags and quoting, shared by tpu.sh and slurm.sh; for sourcing.
# Works with bash 3.2 too, the version of macOS.
# shellcheck shell=bash

# Print one line to stderr; exit with the code of a user's mistake.
die() {
  echo "error: $*" >&2
  exit 2
}

# Quote the words so that any POSIX shell reads them back unchanged.
quote() {
  local LC_ALL=C word line="" single="'" escaped="'\\''"
  for word; do
    case $word in
      "" | *[!A-Za-z0-9_@%+=:,./-]*) word="'${word//$single/$escaped}'" ;;
    esac
    line+=" $word"
  done
  printf '%s' "${line# }"
}

# parse PREFIX "FLAGS WITH VALUE" "SWITCHES" "REPEATED FLAGS" ARGUMENT...
# Set PREFIX_FLAG for each given flag, and the arrays `words` (other arguments), `repeated`
# (values of repeated flags) and `rest` (arguments after --).
parse() {
  local prefix=$1 values=" $2 " switches=" $3 " repeats=" $4 " flag variable value
  shift 4
  words=() repeated=() rest=()
  while (($#)); do
    case $1 in
      --)
        shift
        rest=("$@")
        return
        ;;
      -h | --help)
        usage
        exit 0
        ;;
      --?*)
        flag=${1%%=*}
        flag=${flag#--}
        variable=${prefix}_$(tr 'a-z-' 'A-Z_' <<<"$flag")
        if [[ $switches == *" $flag "* ]]; then
          [[ $1 != *=* ]] || die "--$flag takes no value"
          printf -v "$variable" 1
        elif [[ $values$repeats == *" $flag "* ]]; then
          value=${1#*=}
          if [[ $1 != *=* ]]; then
            shift
            value=${1-}
          fi
          [[ -n $value ]] || die "--$flag needs a value"
          if [[ $repeats == *" $flag "* ]]; then
            repeated+=("$value")
          else
            printf -v "$variable" %s "$value"
          fi
        else
          die "unknown flag --$flag: see $0 --help"
        fi
        ;;
      -*) die "unknown flag $1: see $0 --help" ;;
      *) words+=("$1") ;;
    esac
    shift
  done
}

# Print the value of a trainer's flag among the words: --name=value or --name value.
trainer_flag() {
  local name=$1 previous="" word
  shift
  for word; do
    case $word in
      --"$name"=* | -"$name"=*)
        printf '%s' "${word#*=}"
        return
        ;;
    esac
    case $previous in
      --"$name" | -"$name")
        printf '%s' "$word"
        return
        ;;
    esac
    previous=$word
  done
}

require_number() {
  [[ $2 =~ ^[0-9]+$ ]] || die "$1 must be a whole number, got '$2'"
}
