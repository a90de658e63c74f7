#!/bin/sh
# The GPU's figures of docs/results.md: throughput, share of the matmul peak, memory foretold and measured, peers, for
# every configuration of the sizes tiny and base, each process held to 12 GB. From a bare checkout, with the packages of
# a usual CUDA image (torch >= 2.11, Python 3.11 or later), without a network; under ten minutes.
#
#     sh bench/gpu.sh [FILE.json]
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "bench/gpu.sh: found no CUDA device, expected one")'
out=${1:-runs/bench_gpu.json}
configs=
for size in tiny base; do
	for stage in thinker audio_enc vision talker omni_sft; do configs="$configs configs/${stage}_$size.json"; done
done
# shellcheck disable=SC2086
PYTHONPATH=. timeout 500 "$python" -m bench $configs --device cuda --seconds 3 --memory 12 --json "$out"
PYTHONPATH=. timeout 90 "$python" -m bench configs/thinker_base.json --device cuda --seconds 3 --memory 12 --compile --json "${out%.json}_compiled.json"
