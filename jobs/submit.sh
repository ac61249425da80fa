#!/usr/bin/env bash
# Run a cvrunner command as a Ray job and follow it to its end: jobs/submit.sh COMMAND [ARGUMENTS]
# Exit code 0 if complete, 143 if stopped, otherwise 1. It needs only Ray; `python -m cvrunner submit` does the same with
# more detailed output and exit codes. RAY_ADDRESS is the address of the dashboard.
set -euo pipefail
: "${1:?COMMAND is missing, such as all-folds}"
cd "$(dirname "$0")/.."
export RAY_ADDRESS="${RAY_ADDRESS:-http://127.0.0.1:8265}"
if [[ -n ${RAY_AUTH_TOKEN:-} || -f ${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token} ]]; then
    export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
fi

# The same command with the same configuration has the same id, so a running job is followed instead of started again.
configuration() {
    local LC_ALL=C file
    printf '%s\n' "$@"
    for file in "$@" configs/*.yaml; do [[ ! -f $file ]] || cat -- "$file"; done
}
usual="cvrunner-$1-$(configuration "$@" | sha256sum | head -c 10)"
id=$usual count=1 running=
while status=$(ray job status "$id" 2>/dev/null); do
    if grep -Eq "Status for job '$id': (PENDING|RUNNING)" <<<"$status"; then running=yes && break; fi
    id=$usual-$((++count))
done

if [[ -n $running ]]; then
    ray job logs --follow "$id" || true
else
    ray job submit --submission-id "$id" --metadata-json '{"cvrunner": "jobs/submit.sh"}' \
        --runtime-env jobs/runtime_env.yaml --working-dir . -- python -m cvrunner "$@" || true
fi
case $(ray job status "$id" 2>&1) in
*"Job '$id' succeeded"*) ;;
*"Job '$id' was stopped"*) exit 143 ;;
*) exit 1 ;;
esac
