#!/usr/bin/env bash
# Run a row of results/README.md again from nothing, or go on with it after a stop: training, then every evaluation.
#
#     results/run.sh base        # or: shuffle, mos
#
# Models and logs go to runs/, which is not tracked.
set -euo pipefail
cd "$(dirname "$0")/.."

small="--emsize 200 --nlayers 2 --batch_size 20 --lr 20 --dropout 0.2 --dropouth 0.1 --dropouti 0.2
       --dropoute 0.02 --wdrop 0.2 --epochs 6 --seed 141"
name=${1:-}
case $name in
    base) flags="$small --nhid 400" ;;
    shuffle) flags="$small --nhid 400 --shuffle" ;;
    mos) flags="$small --nhid 374 --n_experts 3 --dropoutl 0.2" ;;
    *) echo "results/run.sh: give one of: base, shuffle, mos" >&2; exit 2 ;;
esac

[ -f data/penn/test.txt ] || ./getdata.sh penn
mkdir -p runs
model="--data data/penn --save runs/$name.pt"
python main.py $model $flags --resume auto
python pointer.py $model --lambdasm 0
python pointer.py $model --search --search_windows 500 2000 | tee "runs/$name.pointer"
best=$(sed -n 's/^| best on val: //p' "runs/$name.pointer")
python dynamiceval.py $model
python dynamiceval.py $model --pointer $best
