#!/usr/bin/env bash
# Every exit code of `hf-continual gate`, by a real case. Run in a folder that tests/gate/runs.py has furnished.
set -u

expect() { # expect CODE WORD COMMAND...: the exit code, and a word of what is printed
  local code=$1 word=$2 said got
  shift 2
  said=$("$@" 2>&1)
  got=$?
  if [ "$got" -ne "$code" ] || [[ "$said" != *"$word"* ]]; then
    printf 'expected exit code %s and "%s", got %s from: %s\n%s\n' "$code" "$word" "$got" "$*" "$said"
    exit 1
  fi
  printf '%s  %s\n' "$got" "$*"
}

gate() { ${HF_CONTINUAL:-hf-continual} gate "$@"; }

expect 0 "pass" gate better --against released --quiet
expect 0 "pass" gate better --against kept.yaml --quiet
expect 2 "regression" gate worse --against released --quiet
expect 2 "regression" gate worse --against kept.yaml --json
expect 4 "rows would tell" gate alike --against released --quiet
expect 3 "Missing option" gate better
expect 3 "no such folder or file" gate better --against nowhere
expect 3 "line 2" gate better --against misspelled.yaml
expect 1 "not finished" gate begun --against released
expect 1 "can be believed" gate damaged --against released
