#!/usr/bin/env bash
# jobs/verify.sh --config configs/finetune.yaml ...: one fold against the target, as one Ray job. 1 where it is missed too.
exec "$(dirname "$0")/submit.sh" verify "$@"
