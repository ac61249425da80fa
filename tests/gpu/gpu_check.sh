#!/usr/bin/env bash
# GPU acceptance of cvrunner on a machine with one NVIDIA GPU, Python 3.12, torch >= 2.11 and no network.
#
#   0. with cvrunner installed on the machine itself:  make gpu-check
#   1. else, in the repository's root, where pip works:  bash tests/gpu/gpu_check.sh prepare
#   2. on the GPU machine, in a copy that has .gpu:  bash .gpu/gpu_check.sh run        (at most 10 minutes)
#   3. the table is the end of the output, everything is in $OUT/gpu_check.{log,json} and $OUT/profile-*.txt
#
# prepare puts script and wheels into .gpu (kept out of git by .git/info/exclude). Ray's wheel is trimmed and recompressed,
# so that checkout and .gpu stay below 64 MiB; where it does not fit, it is left out and the check `ray` says so.
set -u
case "${1:-}" in
prepare)
  here=$(cd "$(dirname "$0")" && pwd)
  rm -rf .gpu/whl .gpu/ray.tar.xz; mkdir -p .gpu/whl && grep -qx '/.gpu/' .git/info/exclude 2>/dev/null || echo '/.gpu/' >> .git/info/exclude
  cp "$here/gpu_check.sh" "$here/gpu_check.py" .gpu/
  plats="--platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64"
  get() { python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none $plats -d "$1" "${@:2}"; }
  at() { grep -iE "^${1//-/[-_]}==" constraints.txt | head -1; }       # the version that the project has tested
  for name in pydantic pydantic-core annotated-types typing-inspection tenacity soundfile soxr cffi pycparser transformers espeakng-loader audmetric audeer typing-extensions psutil filelock packaging safetensors nvidia-ml-py jsonschema jsonschema-specifications referencing rpds-py; do
    what=$(at "$name"); get .gpu/whl "${what:-$name}" || echo "no wheel of $name: if cvrunner needs it there, the check says so"
  done
  get .gpu/ray-wheel "$(at ray)" && python3 - <<'P'
import glob, os, tarfile, zipfile, shutil
wheel = glob.glob(".gpu/ray-wheel/ray-*.whl")[0]
shutil.rmtree(".gpu/ray-tree", ignore_errors=True)
# Only the parts that a one-node cluster without dashboard imports; the rest of the wheel is far over the limit.
drop = ("ray/jars/", "ray/rllib/", "ray/serve/", "ray/dashboard/client/", "ray/cpp/", "ray/train/", "ray/llm/", "ray/data/", "ray/java")
with zipfile.ZipFile(wheel) as z:
    keep = [i for i in z.infolist() if not i.filename.startswith(drop)]
    z.extractall(".gpu/ray-tree", keep)
    modes = {i.filename: i.external_attr >> 16 for i in keep}
for name, mode in modes.items():
    if mode and os.path.isfile(f".gpu/ray-tree/{name}"):
        os.chmod(f".gpu/ray-tree/{name}", mode)
with tarfile.open(".gpu/ray.tar.xz", "w:xz", preset=6) as t:
    t.add(".gpu/ray-tree", arcname=".")
P
  rm -rf .gpu/ray-wheel .gpu/ray-tree
  total=$(( $(du -sm .gpu | cut -f1) + $(git ls-files -z | xargs -0 du -cm 2>/dev/null | tail -1 | cut -f1) ))
  if [ "$total" -ge 63 ]; then echo "$total MiB with Ray: too much, left out"; rm -f .gpu/ray.tar.xz; fi
  du -sh .gpu; ls -la .gpu .gpu/whl
  ;;
run)
  export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false RAY_DEDUP_LOGS=0 OUT="${OUT:-/tmp/out}"
  mkdir -p "$OUT" /tmp/site
  # One site for all wheels; the machine's own torch, numpy, scipy and tokenizers stay.
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .gpu/whl/*.whl || exit 1
  if [ -f .gpu/ray.tar.xz ]; then tar -xJf .gpu/ray.tar.xz -C /tmp/site || echo "Ray could not be unpacked"; fi
  export PYTHONPATH=/tmp/site${PYTHONPATH:+:$PYTHONPATH}
  nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used --format=csv,noheader
  set -o pipefail
  # 500 s of checks leave time for what is running to end within the 600.
  python3 .gpu/gpu_check.py --device cuda:0 --budget 480 "${@:2}" 2>&1 | tee "$OUT/gpu_check.log"
  ;;
rehearse)   # anywhere, on a CPU, in minutes
  python3 "$(dirname "$0")/gpu_check.py" --device cpu --tiny "${@:2}"
  ;;
*) sed -n '2,12p' "$0" ;;
esac
