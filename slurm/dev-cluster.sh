#!/usr/bin/env bash
# A real SLURM on one machine, for development and tests: four nodes on loopback, accounting, preemption.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: dev-cluster.sh up|down|status|reset

  up       install SLURM if it is missing, start what is not running, wait until all four nodes can work
  down     stop everything and remove its state
  status   one line for each daemon and node; exit 1 when something is wrong
  reset    cancel all jobs, bring nodes back, wait until all are idle

Partitions, all on n[1-4], two CPUs each:
  low (default)  preempted at once (GraceTime 0) and requeued      high    preempts the others
  lowgrace       preempted after 30 s of grace and requeued        cancel  preempted and not requeued
  short          time limit of two minutes

Environment:
  LLMOPS_SLURM_DIR       state and logs             (/var/lib/llmops-slurm)
  LLMOPS_KILLWAIT        s from TERM to KILL        (30)
  LLMOPS_SLURMD_TIMEOUT  s until a node is down     (20)
  LLMOPS_PROCTRACK       linuxproc or cgroup        (linuxproc)
  LLMOPS_SLURM_CONF      more lines of slurm.conf, separated by ";"; they win over the script's own
A running cluster keeps the values it was given until others are named.

Exit codes: 0 done; 1 failed or unhealthy; 2 refused: wrong usage, or the machine belongs to another cluster.
TEXT
}

say() { printf 'dev-cluster: %s\n' "$*"; }
fail() { printf 'dev-cluster: %s\n' "$*" >&2; exit 1; }
refuse() { printf 'dev-cluster: %s\n' "$*" >&2; exit 2; }

TEMPLATES=$(dirname "$(realpath "${BASH_SOURCE[0]}")")/dev-cluster
DIR=$(realpath -m "${LLMOPS_SLURM_DIR:-/var/lib/llmops-slurm}")
CONF=$DIR/slurm.conf
SYSTEM_CONF=/etc/slurm/slurm.conf
MARKER='# llmops-dev-cluster'
NODES=(n1 n2 n3 n4)
DAEMONS=(munged mariadbd slurmdbd slurmctld "${NODES[@]/#/slurmd.}")
declare -A DEFAULTS=([LLMOPS_KILLWAIT]=30 [LLMOPS_SLURMD_TIMEOUT]=20 [LLMOPS_PROCTRACK]=linuxproc
  [LLMOPS_SLURM_CONF]="")
PACKAGES=(slurm-wlm slurmdbd slurmrestd munge mariadb-server)
export SLURM_CONF=$CONF

# ---- processes ------------------------------------------------------------------------------------------------------

pid_of() { cat "$DIR/run/$1.pid" 2>/dev/null || true; }

# Every daemon carries the state folder in its environment: a recycled pid is never taken for ours.
is_ours() {
  [[ $1 =~ ^[0-9]+$ ]] && grep -qzxF "LLMOPS_SLURM_DIR=$DIR" "/proc/$1/environ" 2>/dev/null
}

# slurmctld forks a helper that overwrites its own environment.
is_ours_or_child() {
  is_ours "$1" || is_ours "$(sed -n 's/^PPid:\t//p' "/proc/$1/status" 2>/dev/null)"
}

alive() {
  local pid
  pid=$(pid_of "$1")
  is_ours "$pid" && [[ $(cat "/proc/$pid/comm" 2>/dev/null) == "${1%%.*}" ]]
}

# The pids of all processes with this name that are not about to vanish.
named() {
  local pid
  for pid in $(pids_of_name "$1"); do
    if [[ -n $(tr -d '\0' <"/proc/$pid/cmdline" 2>/dev/null) ]]; then echo "$pid"; fi
  done
}

pids_of_name() {
  awk -F'\t' -v name="$1" '
    $1 == "Name:" { matches = ($2 == name) }
    $1 == "Pid:" && matches { print $2 }
  ' /proc/[0-9]*/status 2>/dev/null || true
}

# A clean environment and no descriptor of the caller, so that whoever reads our output sees its end.
try() (
  local descriptor
  for descriptor in /proc/self/fd/*; do
    descriptor=${descriptor##*/}
    # A lock that a caller holds by an open file would last as long as the daemon. 255 is bash's own.
    if ((descriptor > 2 && descriptor < 255)); then exec {descriptor}>&-; fi
  done
  exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LLMOPS_SLURM_DIR="$DIR" \
    SLURM_CONF="$CONF" MYSQL_UNIX_PORT="$DIR/mariadb/socket" "$@" </dev/null >>"$DIR/log/start.log" 2>&1
)

spawn() {
  try "$@" || { complaints "$1"; fail "could not start $1; the logs are in $DIR/log"; }
}

# The last errors in the logs of daemons whose name starts so.
complaints() { grep -hE 'error|fatal|ERROR' "$DIR/log/$1"*.log 2>/dev/null | tail -n 3 >&2 || true; }

# wait_for SECONDS WHAT COMMAND...
wait_for() {
  local limit=$1 what=$2 deadline=$((SECONDS + $1))
  shift 2
  until "$@" >/dev/null 2>&1; do
    if ((SECONDS >= deadline)); then
      complaints ""
      fail "waited ${limit} s for ${what}; the logs are in $DIR/log"
    fi
    sleep 0.1
  done
}

gone() { ! alive "$1"; }

stop() {
  local pid
  alive "$1" || return 0
  pid=$(pid_of "$1")
  kill -CONT "$pid"
  kill -TERM "$pid"
  for _ in {1..100}; do
    if gone "$1"; then return 0; fi
    sleep 0.1
  done
  kill -KILL "$pid" || true
  wait_for 5 "the end of $1 (pid $pid)" gone "$1"
}

# ---- may we? --------------------------------------------------------------------------------------------------------

refuse_settings() {
  local name
  [[ $DIR =~ ^[A-Za-z0-9/._-]+$ ]] || refuse "LLMOPS_SLURM_DIR=$DIR: only letters, digits and / . _ - are allowed"
  for name in LLMOPS_KILLWAIT LLMOPS_SLURMD_TIMEOUT; do
    [[ ${!name:-0} =~ ^[0-9]+$ ]] || refuse "$name=${!name}: must be a whole number of seconds"
  done
  [[ ${LLMOPS_SLURM_CONF:-} != *$'\n'* ]] || refuse "LLMOPS_SLURM_CONF: lines are separated by ';'"
  [[ ${LLMOPS_PROCTRACK:-cgroup} =~ ^(cgroup|linuxproc)$ ]] ||
    refuse "LLMOPS_PROCTRACK=$LLMOPS_PROCTRACK: must be linuxproc or cgroup"
}

refuse_foreign() {
  local pid name owner
  if [[ -e $SYSTEM_CONF ]]; then
    owner=$(sed -n "s|^$MARKER ||p" "$SYSTEM_CONF")
    [[ -n $owner ]] || refuse "this machine belongs to a cluster: $SYSTEM_CONF was not written by this script"
    [[ $owner == "$DIR" || ! -e $owner ]] ||
      refuse "another development cluster lives in $owner: set LLMOPS_SLURM_DIR=$owner, or take it down first"
  fi
  if [[ -d $DIR && ! -e $DIR/.llmops && -n $(ls -A "$DIR") ]]; then
    refuse "$DIR is not empty and was not made by this script: set LLMOPS_SLURM_DIR to another folder"
  fi
  for name in slurmctld slurmd; do
    for pid in $(named "$name"); do
      # A child that ends while it is looked at is nobody's: it must still be there.
      if ! is_ours_or_child "$pid" && named "$name" | grep -qx "$pid"; then
        refuse "this machine belongs to a cluster: $name (pid $pid) was not started by this script"
      fi
    done
  done
}

# ---- set-up ---------------------------------------------------------------------------------------------------------

install_packages() {
  local tool missing=""
  for tool in munged mariadbd slurmdbd slurmrestd slurmctld slurmd sbatch; do
    command -v "$tool" >/dev/null || missing+=" $tool"
  done
  [[ -n $missing ]] || return 0
  command -v apt-get >/dev/null || fail "missing:$missing; only Debian and Ubuntu are known: install SLURM by hand"
  say "installing ${PACKAGES[*]}"
  # The packages' own services must not start: they would be a second cluster and a system database.
  local policy=/usr/sbin/policy-rc.d ours=""
  if [[ ! -e $policy ]]; then
    ours=yes
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  export DEBIAN_FRONTEND=noninteractive
  # The tests install packages, too, and apt-get refuses to run twice at a time.
  flock /var/lock/llmops-apt apt-get -qq update >&2 9>&-
  flock /var/lock/llmops-apt apt-get -qq install -y --no-install-recommends "${PACKAGES[@]}" >&2 9>&-
  if [[ -n $ours ]]; then rm -f "$policy"; fi
}

make_folders() {
  mkdir -p "$DIR"/{run,log,state,spool,munge,mariadb}
  # Clients and jobs read slurm.conf and reach munge's socket; everything else is root's.
  chmod 0755 "$DIR"
  chmod 0700 "$DIR"/{run,log,state,mariadb}
  touch "$DIR/.llmops"
  id llmops >/dev/null 2>&1 || useradd --create-home --shell /bin/bash llmops
}

# setting NAME: the environment's value, else what the cluster was last given, else the default.
setting() {
  local saved=""
  if [[ -r $DIR/settings ]]; then saved=$(sed -n "s/^$1=//p" "$DIR/settings"); fi
  # An empty LLMOPS_SLURM_CONF is a value: it takes back what was there.
  if [[ $1 == LLMOPS_SLURM_CONF && -v $1 ]]; then saved=${!1}; fi
  printf '%s' "${!1:-${saved:-${DEFAULTS[$1]}}}"
}

save_settings() {
  local name
  for name in "${!DEFAULTS[@]}"; do printf '%s=%s\n' "$name" "$(setting "$name")"; done >"$DIR/settings.new"
  mv "$DIR/settings.new" "$DIR/settings"
}

# fill FILE: its @NAME@s replaced.
fill() {
  sed -e "s|@DIR@|$DIR|g" -e "s|@HOST@|$(hostname -s)|g" -e "s|@PROCTRACK@|$(setting LLMOPS_PROCTRACK)|g" \
    -e "s|@KILLWAIT@|$(setting LLMOPS_KILLWAIT)|g" -e "s|@SLURMD_TIMEOUT@|$(setting LLMOPS_SLURMD_TIMEOUT)|g" \
    "$TEMPLATES/$1"
}

# slurmd loads a cgroup plugin even when jobs are not tracked by one. That of v1 then asks nothing of the machine:
# it works in containers and under cgroup v2. Where LLMOPS_PROCTRACK=cgroup cannot work, slurmd's log says why.
render_cgroup_conf() {
  if [[ $(setting LLMOPS_PROCTRACK) == linuxproc ]]; then
    echo CgroupPlugin=cgroup/v1
  elif [[ -d /sys/fs/cgroup/freezer ]]; then
    printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\n'
  else
    printf 'CgroupPlugin=cgroup/v2\nIgnoreSystemd=yes\n'
  fi
}

write_conf() {
  local node
  save_settings
  # Of a key that is there twice slurm.conf's last line counts.
  { fill slurm.conf && setting LLMOPS_SLURM_CONF | tr ';' '\n' && echo; } >"$CONF.new"
  if [[ -e $CONF ]] && ! cmp -s "$CONF" "$CONF.new"; then
    say "settings changed: restarting slurmctld and slurmd (jobs run on)"
    stop slurmctld
    for node in "${NODES[@]}"; do stop "slurmd.$node"; done
  fi
  mv "$CONF.new" "$CONF"
  (umask 077 && fill slurmdbd.conf >"$DIR/slurmdbd.conf")
  render_cgroup_conf >"$DIR/cgroup.conf"
  mkdir -p "${SYSTEM_CONF%/*}"
  printf '%s\nInclude %s\n' "$MARKER $DIR" "$CONF" >"$SYSTEM_CONF"
}

# ---- daemons --------------------------------------------------------------------------------------------------------

start_munged() {
  [[ -s $DIR/munge/key ]] || (umask 077 && head -c 1024 /dev/urandom >"$DIR/munge/key")
  spawn munged --force --socket="$DIR/munge/socket" --key-file="$DIR/munge/key" --seed-file="$DIR/munge/seed" \
    --log-file="$DIR/log/munged.log" --pid-file="$DIR/run/munged.pid"
}

# Settings that trade durability for a quick start: the data live as long as the test cluster.
mariadb_options() {
  printf '%s\n' --no-defaults --user=root --datadir="$DIR/mariadb/data" --innodb-buffer-pool-size=64M \
    --innodb-log-file-size=16M --innodb-flush-log-at-trx-commit=0 --innodb-flush-method=nosync
}

start_mariadbd() {
  local options
  mapfile -t options < <(mariadb_options)
  if [[ ! -e $DIR/mariadb/ready ]]; then
    rm -rf "$DIR/mariadb/data"
    spawn mariadb-install-db "${options[@]}" --skip-test-db --auth-root-authentication-method=normal
    touch "$DIR/mariadb/ready"
  fi
  spawn setsid --fork mariadbd "${options[@]}" --skip-networking --socket="$DIR/mariadb/socket" \
    --pid-file="$DIR/run/mariadbd.pid" --log-error="$DIR/log/mariadbd.log"
  wait_for 30 "mariadbd to answer" mariadb-admin --no-defaults --socket="$DIR/mariadb/socket" --user=root ping
}

start_slurmdbd() {
  spawn slurmdbd
  wait_for 30 "slurmdbd to answer" sacctmgr -n show cluster
}

start_slurmctld() {
  spawn slurmctld -f "$CONF"
  wait_for 30 "slurmctld to answer" scontrol ping
}

start_slurmd() { spawn slurmd -f "$CONF" -N "${1#slurmd.}"; }

start_missing() {
  local daemon
  for daemon in "${DAEMONS[@]}"; do
    if alive "$daemon"; then
      kill -CONT "$(pid_of "$daemon")"
    else
      "start_${daemon%%.*}" "$daemon"
    fi
    if [[ $daemon == slurmdbd ]]; then register; fi
  done
}

registered() {
  [[ $(sacctmgr -nP show assoc cluster=llmops account=llmops format=user 2>/dev/null | sort | xargs) == "llmops root" ]]
}

register() {
  if registered; then return 0; fi
  try sacctmgr -i add cluster llmops || true
  try sacctmgr -i add account llmops cluster=llmops || true
  try sacctmgr -i add user root,llmops account=llmops cluster=llmops || true
  wait_for 10 "sacctmgr to know cluster llmops and its users" registered
}

# ---- nodes and jobs -------------------------------------------------------------------------------------------------

node_states() { sinfo -h -N -p low -o '%N %T'; }

# nodes_are REGEX: all four nodes have a matching state.
nodes_are() { [[ $(node_states | grep -cE "^n[1-4] ($1)\$") == "${#NODES[@]}" ]]; }

resume_nodes() {
  local node state
  while read -r node state; do
    if [[ $state =~ ^(down|drain|fail|error) ]]; then scontrol update nodename="$node" state=resume || true; fi
  done < <(node_states)
}

workable() { nodes_are 'idle|mixed|allocated|completing'; }

no_jobs() { [[ -z $(squeue -h -o %A) ]]; }

# Without waiting for KillWait, and with the processes that outlived their job.
kill_job_processes() {
  grep -lzxF SLURM_CLUSTER_NAME=llmops /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3 | xargs -r kill -KILL 2>/dev/null || true
}

cancel_jobs() {
  squeue -h -o %F | xargs -r scancel >/dev/null 2>&1 || true
  kill_job_processes
  no_jobs
}

# They overwrite their environment, but refuse_foreign has seen that no other cluster's slurmd is here.
kill_steps() { named slurmstepd | xargs -r kill -KILL 2>/dev/null || true; }

# ---- commands -------------------------------------------------------------------------------------------------------

bring_up() {
  install_packages
  make_folders
  write_conf
  start_missing
  if ! workable; then resume_nodes; fi
}

up() {
  bring_up
  wait_for 60 "nodes ${NODES[*]} to be ready" workable
  say "up: four nodes, logs in $DIR/log"
}

reset() {
  bring_up
  wait_for 90 "all jobs to end" cancel_jobs
  resume_nodes
  wait_for 60 "nodes ${NODES[*]} to be idle" nodes_are idle
  say "reset: no jobs, four idle nodes"
}

down() {
  local daemon
  if alive slurmctld; then
    kill -CONT "$(pid_of slurmctld)"
    cancel_jobs || true
  fi
  for daemon in slurmd.n{1..4} slurmctld slurmdbd mariadbd munged; do stop "$daemon"; done
  kill_job_processes
  kill_steps
  if [[ -e $DIR/.llmops ]]; then rm -rf "$DIR"; fi
  if [[ -e $SYSTEM_CONF ]]; then rm -f "$SYSTEM_CONF"; fi
  say "down"
}

status() {
  local daemon sick=0
  for daemon in "${DAEMONS[@]}"; do
    if alive "$daemon"; then
      printf '%-10s up    pid %s\n' "$daemon" "$(pid_of "$daemon")"
    else
      printf '%-10s DOWN\n' "$daemon"
      sick=1
    fi
  done
  if alive slurmctld; then
    node_states || sick=1
    workable || sick=1
  fi
  return "$sick"
}

main() {
  local lock=/run/llmops-slurm.lock
  case ${1:-} in up | down | status | reset) ;; -h | --help) usage; exit 0 ;; *) usage >&2; exit 2 ;; esac
  [[ $# -eq 1 ]] || { usage >&2; exit 2; }
  [[ $EUID -eq 0 ]] || refuse "needs root: it starts daemons that run jobs as other users"
  refuse_settings
  cd /
  if [[ $1 != status ]]; then
    exec 9>"$lock"
    flock -w 300 9 || fail "waited 300 s for another $0 to end (lock $lock)"
  fi
  refuse_foreign
  "$1"
}

main "$@"
