#!/usr/bin/env bash
# jobs/all_folds.sh --config configs/finetune.yaml ...: every condition, fold and seed as one Ray job.
exec "$(dirname "$0")/submit.sh" all-folds "$@"
