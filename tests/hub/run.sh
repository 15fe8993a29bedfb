#!/usr/bin/env bash
# Exported folders in Transformers 4.51.3 and in the newest 5.x, in virtual environments of their own:
#
#     tests/hub/run.sh VENV          VENV/4.51.3 and VENV/newest are made unless they exist; some 2 GB each
#     tests/hub/run.sh VENV 4.51.3   one of them
#
# It needs the network, or an index of packages, to make the environments.
set -euo pipefail
venv=$(realpath -m "${1:?give a folder for the virtual environments}")
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1 HF_HOME="$venv/cache"

for version in ${2:-4.51.3 newest}; do
    place="$venv/$version"
    package="transformers==$version"
    [ "$version" = newest ] && package="transformers>=5"
    if [ ! -e "$place/ready" ]; then
        python3 -m venv "$place"
        "$place/bin/python" -m pip install -q -r requirements.txt "$package" minicons lm-eval pytest
        touch "$place/ready"
    fi
    "$place/bin/python" -c "import torch, transformers as t; print('transformers', t.__version__, 'torch', torch.__version__)"
    "$place/bin/python" -m pytest -o addopts= -p no:cacheprovider -q tests/hub/hub_checks.py
done
