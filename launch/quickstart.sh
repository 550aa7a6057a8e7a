#!/usr/bin/env bash
# Install, then train head v2 on real reviews with a real pretrained BERT: the main job.
#   launch/quickstart.sh [FLAGS OF train.py]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}

"$root/launch/install.sh"
device=$("$venv/bin/python" -c 'import torch; print("gpu" if torch.cuda.is_available() else "cpu")')
exec "$venv/bin/accelerate" launch --config_file "$root/launch/$device.yaml" \
    --num_cpu_threads_per_process "$(nproc)" "$root/toolkit/train.py" --head v2 "$@"
