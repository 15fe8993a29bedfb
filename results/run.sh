#!/usr/bin/env bash
# Runs a row of results/README.md again: the training, then every evaluation. If it was stopped in training, it goes on
# there. `sprint`, `original`, the `equal-` rows and the characters have no evaluation: training prints all their figures.
#
#     results/run.sh hour            # any NAME of the list below
#     results/run.sh melis 2e-3      # with another learning rate
#     SEED=142 results/run.sh base   # with another seed
#     results/run.sh ptb-qrnn; results/run.sh ptb-qrnn-tuned   # a published run, on a GPU
#     results/run.sh ptb-qrnn --tiny # at toy sizes: does it run?
#
# A published run first picks those of --graphs, --padded and --persistent that keep the losses and are fastest.
# If an earlier log of it is known, it is compared with that log after a few epochs, and ends if it is far away.
# Models and logs go to runs/, which git ignores.
set -euo pipefail
cd "$(dirname "$0")/.."

tiny=
if [ "${!#}" = --tiny ]; then tiny=tiny-; set -- "${@:1:$#-1}"; fi

seed=${SEED:-141} again=${SEED:+-seed$SEED}  # the end of a name when SEED is given
small="--emsize 200 --nlayers 2 --batch_size 20 --lr ${2:-20} --dropout 0.2 --dropouth 0.1 --dropouti 0.2
       --dropoute 0.02 --wdrop 0.2 --epochs 6 --seed $seed"
recipe="--nlayers 2 --batch_size 20 --bptt 70 --optimizer adam --beta1 0 --average --alpha 0 --beta 0 --wdecay 3.6e-6
        --clip 0.143 --dropout 0.2 --dropouth 0.1 --dropouti 0.2 --dropoute 0.02 --when 6 --epochs 8 --seed $seed"
cell="--model Mogrifier --rounds 0 --nlayers 2 --batch_size 20 --bptt 70 --shuffle --optimizer adam --beta1 0
      --lr ${2:-4e-3} --alpha 0 --beta 0 --wdecay 3.6e-6 --clip 0.143 --seed $seed"
chars="--emsize 200 --batch_size 32 --bptt 100 --optimizer adam --lr ${2:-3e-3} --alpha 0 --beta 0
       --dropout 0.1 --dropouth 0.1 --dropouti 0 --dropoute 0 --wdrop 0 --anneal 1 --epochs 4 --seed $seed"
large="$cell --emsize 400 --nhid 400 --dropout 0.5 --dropouth 0.3 --dropouti 0.5 --dropoute 0.02 --dropoutr 0.25 --epochs 18"
wide="$cell --emsize 512 --nhid 512 --batch_size 40 --bptt 35 --splits 2000 --amp bf16"
equal="--model Mogrifier --nlayers 2 --batch_size 40 --bptt 35 --shuffle --alpha 0 --beta 0 --wdecay 3.6e-6 --clip 0.143
       --splits 2000 --amp bf16 --dropout 0.2 --dropouth 0.1 --dropouti 0.2 --dropoute 0.02 --dropoutr 0.2 --seed $seed"
melis="--rounds 0 --emsize 272 --nhid 272" rlstm="--cell rlstm --rounds 0 --emsize 280 --nhid 280"
adam="--optimizer adam --beta1 0" annealed="--optimizer adam --beta1 0 --anneal 1"
name=${1:-} data=penn from= search= evaluate=yes setting= known=
case $name in
    hour) flags="$large --anneal 6"
          search="--search --search_lrs 1.5e-5 3e-5 4e-5 --search_lambs 2e-3 4e-3 --search_tokens 8000" ;;
    hour-wide) flags="$wide --dropout 0.5 --dropouth 0.3 --dropouti 0.5 --dropoute 0.02 --dropoutr 0.25 --anneal 5 --epochs 25"
               search="--search --search_lrs 3e-5 5e-5 --search_lambs 4e-3 8e-3 1.6e-2 --search_tokens 5000
                       --search_temperatures 0.9 0.95 1" ;;
    sprint) flags="$wide --dropout 0.35 --dropouth 0.15 --dropouti 0.35 --dropoute 0.02 --dropoutr 0.15 --anneal 1 --epochs 8"
            evaluate= ;;
    split) flags="$large --splits 2000 --anneal 2" search="--lr 4e-5 --lamb 4e-3" ;;
    split-tuned) flags="--lr ${2:-15} --epochs 3" from=split search="--lr 4e-5 --lamb 4e-3" ;;
    hour-epyc) flags="$cell --emsize 400 --nhid 400 --dropout 0.4 --dropouth 0.2 --dropouti 0.4 --dropoute 0.02 --dropoutr 0.2
                      --splits 2000 --anneal 1 --epochs 11" search="--lr 4e-5 --lamb 4e-3" ;;
    hour-epyc-tuned) flags="--lr ${2:-15} --epochs 3" from=hour-epyc search="--lr 4e-5 --lamb 4e-3" ;;
    ten) flags="$cell --emsize 256 --nhid 256 --dropout 0.2 --dropouth 0.1 --dropouti 0.2 --dropoute 0.02 --dropoutr 0.1
                --anneal 1 --epochs 4" ;;
    base) flags="$small --nhid 400" ;;
    gru) flags="$small --model GRU --nhid 493" ;;
    qrnn) flags="$small --model QRNN --nhid 800" ;;
    shuffle) flags="$small --nhid 400 --shuffle" ;;
    mos) flags="$small --nhid 374 --n_experts 3 --dropoutl 0.2" ;;
    awd-adam) flags="$recipe --emsize 220 --nhid 440 --wdrop 0.2 --lr ${2:-4e-3}" ;;
    melis) flags="$recipe --model Mogrifier --rounds 0 --emsize 272 --nhid 272 --dropoutr 0.2 --lr ${2:-4e-3}" ;;
    mogrifier) flags="$recipe --model Mogrifier --rounds 5 --rank 40 --emsize 260 --nhid 260 --dropoutr 0.2 --lr ${2:-2e-3}" ;;
    equal-melis) flags="$equal $melis $annealed --lr ${2:-8e-3} --epochs 8" evaluate= ;;
    equal-samples) flags="$equal $melis $annealed --lr ${2:-8e-3} --epochs 8 --samples 4" evaluate= ;;
    equal-two-tailed) flags="$equal $melis $adam --lr ${2:-4e-3} --epochs 8 --average two-tailed" evaluate= ;;
    equal-sgd) flags="$equal $melis --lr ${2:-20} --epochs 8" evaluate= ;;
    equal-rlstm) flags="$equal $rlstm $annealed --lr ${2:-4e-3} --epochs 8" evaluate= ;;
    equal-rlstm-chrono) flags="$equal $rlstm $annealed --lr ${2:-4e-3} --epochs 8 --chrono 20" evaluate= ;;
    equal-rlstm-rounds) flags="$equal --cell rlstm --rounds 5 --rank 40 --emsize 270 --nhid 270 $annealed --lr ${2:-4e-3}
                               --epochs 8" evaluate= ;;
    equal-short) flags="$equal $melis $annealed --lr ${2:-8e-3} --epochs 2" evaluate= ;;
    equal-samples-short) flags="$equal $melis $annealed --lr ${2:-8e-3} --epochs 2 --samples 4" evaluate= ;;
    original) flags="--emsize 200 --nhid 500 --nlayers 2 --batch_size 40 --dropouti 0.3 --dropouth 0.2 --dropout 0.3
                     --wdrop 0.4 --lr ${2:-30} --epochs 3 --seed $seed" evaluate= ;;
    ptb-qrnn) flags="--model QRNN --batch_size 20 --clip 0.2 --wdrop 0.1 --nhid 1550 --nlayers 4 --emsize 400 --dropouth 0.3
                     --dropouti 0.4 --lr ${2:-30} --epochs 550 --seed ${SEED:-9001}"
              setting=ptb-qrnn known="results/ptb-qrnn-h100.log.jsonl 5 10 31" evaluate=published ;;
    ptb-qrnn-tuned) flags="--lr ${2:-30} --epochs 300 --seed ${SEED:-404}" from=ptb-qrnn setting=ptb-qrnn evaluate=published ;;
    ptb-lstm) flags="--batch_size 20 --dropouti 0.4 --dropouth 0.25 --lr ${2:-30} --epochs 500 --seed $seed"
              setting=ptb-lstm evaluate=published ;;
    ptb-lstm-tuned) flags="--lr ${2:-30} --epochs 500 --seed $seed" from=ptb-lstm setting=ptb-lstm evaluate=published ;;
    char-lstm) flags="$chars --nhid 450 --nlayers 2" data=pennchar evaluate= ;;
    char-qrnn) flags="$chars --model QRNN --nhid 400 --nlayers 4" data=pennchar evaluate= ;;
    *) echo "results/run.sh: there is no run '$name'. Choose hour, hour-wide, hour-epyc, hour-epyc-tuned, sprint, split," \
            "split-tuned, ten, base, gru, qrnn, shuffle, mos, awd-adam, melis, mogrifier, equal-melis, equal-rlstm," \
            "equal-rlstm-chrono, equal-rlstm-rounds, equal-two-tailed, equal-sgd, equal-samples, equal-short," \
            "equal-samples-short, original, ptb-qrnn, ptb-qrnn-tuned, ptb-lstm, ptb-lstm-tuned, char-lstm or char-qrnn" >&2; exit 2 ;;
esac
name=$tiny$name${2:+-$2}$again from=${from:+$tiny$from$again}
if [ "$tiny" ]; then
    flags="$flags --epochs 3" known=
    [ "$from" ] || flags="$flags --emsize 12 --nhid 12 --batch_size 4 --bptt 6"
fi

[ -f "data/$data/test.txt" ] || ./getdata.sh "$data"
mkdir -p runs
model="--data data/$data --save runs/$name.pt"
if [ "$from" ]; then
    [ -f "runs/$from.pt" ] || { echo "results/run.sh: '$name' fine-tunes the model of '$from', but there is no" \
        "runs/$from.pt. Train it first." >&2; exit 2; }
fi
if [ "$setting" ]; then
    if [ ! -f "runs/$name.flags" ]; then
        python bench.py --fastest $setting ${tiny:+--tiny} > "runs/$name.flags.new"
        mv "runs/$name.flags.new" "runs/$name.flags"
    fi
    flags="$flags $(cat "runs/$name.flags")"
fi
if [ "$known" ] && [ ! -f "runs/$name.checked" ]; then
    python main.py $model $flags --epochs "${known##* }" --resume auto
    python results/check.py "runs/$name.pt.log.jsonl" $known
    touch "runs/$name.checked"
fi
if [ "$from" ]; then
    python finetune.py --data "data/$data" --save "runs/$from.pt" --output "runs/$name.pt" $flags --resume auto
else
    python main.py $model $flags --resume auto
fi
[ "$evaluate" ] || exit 0
python pointer.py $model --lambdasm 0
if [ "$evaluate" = published ]; then
    python pointer.py $model --lambdasm 0.1 --theta 1.0 --window 500 --bptt 5000
    exit 0
fi
python pointer.py $model --search --search_windows 500 2000 | tee "runs/$name.pointer"
best=$(sed -n 's/^| best on val: //p' "runs/$name.pointer")
python dynamiceval.py $model $search | tee "runs/$name.dynamic"
rates=$(sed -n 's/^| best on val: //p' "runs/$name.dynamic")
rates=${rates:-$search}  # no search: the given settings, or else the published ones
python dynamiceval.py $model --pointer $best $rates
