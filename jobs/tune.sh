#!/usr/bin/env bash
# jobs/tune.sh --config configs/finetune.yaml ...: a search for better settings, as one Ray job.
exec "$(dirname "$0")/submit.sh" tune "$@"
