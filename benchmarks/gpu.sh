#!/bin/sh
# All that is to be known about one GPU, in 20 minutes at most: writes docs/gpu.md, with docs/performance/gpu.json and tests.log.
#   benchmarks/gpu.sh            all of it          (pip install -c constraints.txt -e '.[bench,test]' first)
#   benchmarks/gpu.sh --short    a few minutes
cd "$(dirname "$0")/.." || exit
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD/.typings${PYTHONPATH:+:$PYTHONPATH}"
exec timeout 1200 "${PYTHON:-python3}" benchmarks/gpu.py "$@"
