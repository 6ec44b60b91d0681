#!/usr/bin/env bash
# The learner on a Cloud TPU slice, through gcloud: ask for the slice, install, train, and begin again
# after a preemption. Runs on any Linux machine with gcloud and a clone of this repository.
#
#   ZONE=us-east5-a bash launch/tpu_pod.sh train CONFIG --run-dir /shared/runs/NAME [more flags]
#   ZONE=us-east5-a bash launch/tpu_pod.sh state | log | stop | delete
#
# train    finds the queued resource or creates it, waits until it is ACTIVE, installs this commit on
#          every host, starts `jaxrl-llm train CONFIG --multihost FLAGS` on every host and shows the log
#          of process 0 until the run ends. A slice that is preempted (SUSPENDED) or could not be had
#          (FAILED) is deleted and asked for again, and the same command goes on from the last
#          checkpoint. Ctrl-C leaves the run alone; the same `train` shows its log again.
# state    of the queued resource
# log      of process 0, followed
# stop     ends the run after its step, with a checkpoint; before other flags or other code
# delete   gives the slice back; until then it costs
#
# On each host a systemd service (launch/tpu_pod.service) runs the process and restarts it if it dies, or
# if it ended since another host restarts: the run has ended when process 0 has, with all steps done.
# The run directory must be on storage that all hosts see and that outlives the slice.
#
# ZONE             where, such as us-east5-a; it must have the accelerator
# NAME             of the queued resource and its node, jaxrl-learner unless set
# PROJECT          gcloud's own unless set
# ACCELERATOR      v5p-64 unless set: for v5p the number counts TensorCores, two a chip, so 32 chips;
#                  for v6e and v5litepod it counts chips
# RUNTIME          software of the hosts; that of the accelerator unless set
# SPOT=1           cheaper, and may be preempted
# NETWORK, SUBNETWORK, SERVICE_ACCOUNT
#                  gcloud's defaults unless set; the network must reach the servers and the share
# INTERNAL_IPS=1   hosts without external addresses; they need Cloud NAT to install
# CREATE_FLAGS     more flags of `gcloud compute tpus queued-resources create`, such as
#                  "--reserved" or "--valid-until-duration=6h"
# SSH_FLAGS        more flags of `gcloud compute tpus tpu-vm ssh` and scp: "--tunnel-through-iap"
# NFS, SHARED      file share of the run directory and where hosts mount it: launch/tpu_host.sh
# MODEL, PROMPTS, SGLANG_URL, SGLANG_API_KEY, JAX_COMPILATION_CACHE_DIR
#                  go to the learner if set, over ssh and into a file that root alone can read
# PASS             more variables that do, separated by spaces
# DELETE=1         gives the slice back when the run has ended, well or not, or by `stop`
# POLL_SECONDS     between looks at the slice and the run, 60 unless set
# ATTEMPTS         calls of gcloud, requests or installations that may fail in a row: 5 unless set
#
# The exit status is 0 when the run has ended well, 3 when its early warning ended it, 130 after `stop`,
# as those of the learner, and 1 when it failed or the slice cannot be had.
set -euo pipefail
cd "$(dirname "$0")/.."
name="${NAME:-jaxrl-learner}" accelerator="${ACCELERATOR:-v5p-64}"
poll="${POLL_SECONDS:-60}" attempts="${ATTEMPTS:-5}"
service="jaxrl-llm"

usage() {
  echo "Usage: ZONE=... bash launch/tpu_pod.sh train CONFIG --run-dir FOLDER [flags]" >&2
  echo "       ZONE=... bash launch/tpu_pod.sh state | log | stop | delete" >&2
  exit 2
}

say() { echo "$(date +%T) $*" >&2; }

runtime() {
  case "$accelerator" in
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    *)
      echo "No runtime is known for ACCELERATOR=$accelerator; set RUNTIME" >&2
      return 1
      ;;
  esac
}

queued() { gcloud compute tpus queued-resources "$@" "${place[@]}"; }

# hosts WORKER COMMAND: on one host, or on all.
hosts() {
  # shellcheck disable=SC2086  # several flags in one variable
  gcloud compute tpus tpu-vm ssh "$name" --worker="$1" --command="$2" --quiet "${place[@]}" ${SSH_FLAGS:-}
}

# The state of the queued resource; nothing if there is none.
state() {
  local attempt
  for ((attempt = 1; attempt <= attempts; attempt++)); do
    queued list --filter="name~/$name\$" --format="value(state.state)" && return
    sleep "$poll"
  done
  echo "gcloud failed $attempts times in a row; its message is above" >&2
  return 1
}

create() {
  local flags=(--node-id="$name" --accelerator-type="$accelerator" --runtime-version="$runtime")
  [ -z "${SPOT:-}" ] || flags+=(--spot)
  [ -z "${NETWORK:-}" ] || flags+=(--network="$NETWORK")
  [ -z "${SUBNETWORK:-}" ] || flags+=(--subnetwork="$SUBNETWORK")
  [ -z "${SERVICE_ACCOUNT:-}" ] || flags+=(--service-account="$SERVICE_ACCOUNT")
  [ -z "${INTERNAL_IPS:-}" ] || flags+=(--internal-ips)
  # shellcheck disable=SC2086  # several flags in one variable
  queued create "$name" "${flags[@]}" ${CREATE_FLAGS:-}
}

delete() { queued delete "$name" --force --quiet; }

# Returns when the slice is ACTIVE, whatever state it is in before.
acquire() {
  local now before="-" failed=0
  while true; do
    now="$(state)"
    [ "$now" = "$before" ] || say "$name: ${now:-not there}"
    before="$now"
    case "$now" in
      ACTIVE) return ;;
      "") create || failed=$((failed + 1)) ;;
      SUSPENDED) delete || failed=$((failed + 1)) ;;
      FAILED)
        failed=$((failed + 1))
        queued describe "$name" --format="yaml(state)" >&2 || true
        [ "$failed" -ge "$attempts" ] || delete || true
        ;;
    esac
    if [ "$failed" -ge "$attempts" ]; then
      echo "$name could not be had in $failed attempts; the causes are above" >&2
      return 1
    fi
    sleep "$poll"
  done
}

# What the learner reads from its environment, as systemd's EnvironmentFile.
environment() {
  local variable value
  for variable in MODEL PROMPTS SGLANG_URL SGLANG_API_KEY JAX_COMPILATION_CACHE_DIR ${PASS:-}; do
    value="${!variable:-}"
    value="${value//\\/\\\\}"
    [ -z "$value" ] || echo "$variable=\"${value//\"/\\\"}\""
  done
  echo "ARGUMENTS=\"train $*\""
}

# install ARGUMENTS: code, environment and service onto every host, started.
install() {
  local folder status=0
  folder="$(mktemp -d)"
  # shellcheck disable=SC2086  # several flags in one variable
  git archive --format=tar.gz --output="$folder/jaxrl_llm.tar.gz" HEAD &&
    (umask 077 && environment "$@" >"$folder/jaxrl_llm.env") &&
    gcloud compute tpus tpu-vm scp "$folder/jaxrl_llm.tar.gz" "$folder/jaxrl_llm.env" "$name:~/" \
      --worker=all --quiet "${place[@]}" ${SSH_FLAGS:-} &&
    hosts all "set -e
      sudo mkdir -p /opt/jaxrl_llm && sudo chown \"\$USER\" /opt/jaxrl_llm
      tar -xzf ~/jaxrl_llm.tar.gz -C /opt/jaxrl_llm
      sudo install -m 600 ~/jaxrl_llm.env /etc/jaxrl_llm.env && rm ~/jaxrl_llm.env
      NFS='${NFS:-}' SHARED='${SHARED:-}' bash /opt/jaxrl_llm/launch/tpu_host.sh
      sudo install -m 644 /opt/jaxrl_llm/launch/tpu_pod.service /etc/systemd/system/$service.service
      sudo systemctl daemon-reload
      sudo systemctl enable $service
      sudo systemctl reset-failed $service || true
      sudo systemctl restart $service" || status=1
  rm -r "$folder"
  return "$status"
}

# What systemd at host 0 says of the run, in a word; nothing if the host cannot be asked.
#   running   or about to be started again
#   ended     with all steps done
#   early     by its early warning
#   failed    for good
#   stopped   by `stop`, which disables the service too
#   away      stopped otherwise, or not started yet, as where the host restarts
service_state() {
  local shown properties="ActiveState,ExecMainCode,ExecMainStatus,UnitFileState"
  shown="$(hosts 0 "systemctl show $service --property=$properties" 2>/dev/null | sort | tr '\n' ' ' || true)"
  case "$shown" in
    # ExecMainCode is 1 where the process has exited, 2 where a signal ended it, and 0 before.
    *"ActiveState=inactive ExecMainCode=1 ExecMainStatus=0 "*) echo ended ;;
    *"ActiveState=failed ExecMainCode=1 ExecMainStatus=3 "*) echo early ;;
    *ActiveState=failed*) echo failed ;;
    *ActiveState=inactive*UnitFileState=disabled*) echo stopped ;;
    *ActiveState=inactive*) echo away ;;
    *ActiveState=*) echo running ;;
  esac
}

show_log() { hosts 0 "sudo journalctl --unit=$service --output=cat --lines=100 --follow"; }

# In a session of its own: gcloud starts ssh, which would outlive it.
start_log() {
  setsid bash launch/tpu_pod.sh log 2>/dev/null &
  log=$!
}

end_log() {
  [ "$log" = 0 ] || kill -- "-$log" 2>/dev/null || true
  log=0
}

# Shows the log until the run ends: 0 well, 3 early, 130 stopped, 1 failed, 2 the slice is gone.
follow() {
  local now run before=""
  while true; do
    if [ "$log" = 0 ] || ! kill -0 "$log" 2>/dev/null; then
      start_log
    fi
    sleep "$poll"
    now="$(state)" || return 1
    if [ "$now" != ACTIVE ]; then
      say "$name: ${now:-not there}; the slice is lost"
      end_log
      return 2
    fi
    run="$(service_state)"
    case "$run" in
      ended)
        say "The run has ended"
        return 0
        ;;
      early)
        say "Its early warning ended the run; all of its log: bash launch/tpu_pod.sh log"
        return 3
        ;;
      stopped)
        say "The run was stopped; the same command goes on with it"
        return 130
        ;;
      failed)
        say "The run failed; all of its log: bash launch/tpu_pod.sh log"
        return 1
        ;;
      away)
        [ "$before" = away ] ||
          say "Host 0 restarts, or the service was stopped there alone; it goes on when that starts again"
        ;;
    esac
    before="${run:-$before}"
  done
}

train() {
  local status=0 failed=0
  while true; do
    acquire
    case "$(service_state)" in
      running) say "The run is under way" ;;
      *)
        if ! install "$@"; then
          failed=$((failed + 1))
          if [ "$failed" -ge "$attempts" ]; then
            echo "The hosts could not be set up in $failed attempts; the causes are above" >&2
            return 1
          fi
          sleep "$poll"
          continue # the slice may be gone
        fi
        ;;
    esac
    status=0 failed=0
    follow || status=$?
    [ "$status" = 2 ] || break
  done
  [ -z "${DELETE:-}" ] || delete
  return "$status"
}

check_arguments() {
  local argument
  case "${1:-}" in
    "" | -*) usage ;;
  esac
  if ! git cat-file -e "HEAD:$1" 2>/dev/null; then
    echo "$1 is not in the last commit, which is what the hosts get; commit it" >&2
    exit 2
  fi
  case " $* " in
    *" --run-dir "* | *" --run-dir="*) ;;
    *)
      echo "Give --run-dir FOLDER on storage that all hosts see: a slice takes its disks with it" >&2
      exit 2
      ;;
  esac
  for argument; do
    case "$argument" in
      *[[:space:]\"\'\\\$%]*)
        echo "'$argument' has a space, a quote, \\, \$ or %, which systemd would read otherwise" >&2
        exit 2
        ;;
    esac
  done
}

command="${1:-}"
[ "$#" = 0 ] || shift
if [ -z "${ZONE:-}" ]; then usage; fi
place=(--zone="$ZONE")
[ -z "${PROJECT:-}" ] || place+=(--project="$PROJECT")
case "$command" in
  train)
    check_arguments "$@"
    runtime="${RUNTIME:-$(runtime)}"
    log=0
    trap end_log EXIT
    train "$1" --multihost "${@:2}"
    ;;
  state) state ;;
  log) show_log ;;
  # Disabled first: by that follow() knows who stopped it, and a host that restarts lets it rest.
  stop) hosts all "sudo systemctl disable $service; sudo systemctl stop $service" ;;
  delete) delete ;;
  *) usage ;;
esac
