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
# So have the same code, user and variables: another user's job is another one.
passed_on=(CVRUNNER_HOME MLFLOW_TRACKING_URI HF_HUB_OFFLINE) variables=() user=$(id -un)
for name in "${passed_on[@]}"; do
    [[ ${!name-} != *://*@* ]] || { echo "$name holds a user name or password" >&2 && exit 2; }
    [[ ! -v $name ]] || variables+=("$name=${!name}")
done
for word in "$@"; do
    [[ $word != *://*@* ]] || { echo "${word%%=*} holds a user name or password" >&2 && exit 2; }
done
configuration() {
    local LC_ALL=C file name
    printf '%s\n' "$@" "$user"
    for name in "${passed_on[@]}"; do printf '%s=%s\n' "$name" "${!name-}"; done
    printf 'python\n'
    for file in "$@" configs/*.yaml jobs/runtime_env.yaml; do [[ ! -f $file ]] || cat -- "$file"; done
    find cvrunner -name '*.py' -type f | LC_ALL=C sort | tr '\n' '\0' | xargs -0 cat --
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
    ray job submit --submission-id "$id" --metadata-json "{\"cvrunner\": \"jobs/submit.sh\", \"user\": \"$user\"}" \
        --runtime-env jobs/runtime_env.yaml --working-dir . -- ${variables[@]+env "${variables[@]}"} python -m cvrunner "$@" || true
fi
case $(ray job status "$id" 2>&1) in
*"Job '$id' succeeded"*) ;;
*"Job '$id' was stopped"*) exit 143 ;;
*) exit 1 ;;
esac
