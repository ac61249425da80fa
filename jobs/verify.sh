#!/usr/bin/env bash
# Train one fold as one Ray job and compare its validation CCC with the target:
# jobs/verify.sh --config configs/finetune.yaml ...
# Exit code 1 also if the target is missed.
exec "$(dirname "$0")/submit.sh" verify "$@"
