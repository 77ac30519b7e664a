#!/bin/sh
# sh steps.sh COUNT COMMAND...: COMMAND with each number from 1 to COUNT, going on where it was stopped.
set -eu
count=$1
shift
control=${LLMOPS_CONTROL_DIR:-} # empty outside of a job
first=$((${LLMOPS_RESUME_STEP:-0} + 1))

# Some clusters send signals to every process of a job: the stop file is what counts.
[ -z "$control" ] || trap '' TERM USR1 USR2

tell() { # a file is there as a whole or not at all
  echo "$2" > "$control/.$1"
  mv "$control/.$1" "$control/$1"
}

step=$first
while [ "$step" -le "$count" ]; do
  "$@" "$step"
  if [ -n "$control" ]; then
    tell "heartbeat.$RANK" "{\"step\": $step, \"first_step\": $first, \"phase\": \"train\", \"time\": $(date +%s)}"
    tell "committed.$RANK" "{\"step\": $step}"
    if [ -e "$control/stop" ] && [ "$step" -lt "$count" ]; then
      tell "stopped.$RANK" "{\"step\": $step}"
      exit 75
    fi
  fi
  step=$((step + 1))
done
echo "done at $count"
