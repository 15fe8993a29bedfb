#!/bin/sh
#   ./getdata.sh                      Penn Treebank and WikiText-2
#   ./getdata.sh pydocs               English out of Python's own documentation: no network needed
#   ./getdata.sh all                  every corpus: CORPORA
#   ./getdata.sh --check [NAME...]    hold what is there against the known counts and checksums
#
# A corpus NAME lands in ./data/NAME/{train,valid,test}.txt, all of it or nothing; one that is there is left
# alone. A download that broke off goes on where it stopped when the same command is run again.
#
# Needs python3 (or python) and, for the downloads, curl or wget. Environment:
#   AWD_MIRROR=URL    fetch from there alone, under the files' own names: URL/ptb.train.txt,
#                     URL/wikitext-2-v1.zip, ... (all addresses are in corpus/corpora.py)
#   AWD_CHECKS=FILE   JSON that replaces the known counts and checksums (see corpus/corpora.py)
set -eu

# What there is and where, how it becomes text, what it should be: the table in corpora.py says it all
ask() { "$python" "$here/corpus/corpora.py" "$@" </dev/null; }

say() { echo "getdata.sh: $*" >&2; }

there() { [ -f "data/$1/train.txt" ] && [ -f "data/$1/valid.txt" ] && [ -f "data/$1/test.txt" ]; }

# download URL FILE: one try, from where FILE ends; the status is the tool's own
download() {
    if command -v curl >/dev/null; then
        if [ -t 2 ]; then progress=--progress-bar; else progress=-sS; fi
        curl -fL $progress --connect-timeout 20 --speed-limit 1 --speed-time 60 -C - -o "$2" "$1"
    elif command -v wget >/dev/null; then
        wget -nv -c -t 1 -T 60 -O "$2" "$1"
    else
        say "neither curl nor wget is here; install one"
        exit 1
    fi
}

# fetch URL FOLDER: the file, whole, in FOLDER; goes on after a break, starts anew where that is refused
fetch() {
    file=$2/${1##*/}
    url=${AWD_MIRROR:+${AWD_MIRROR%/}/${1##*/}}
    url=${url:-$1}
    [ ! -f "$file" ] || return 0
    say "fetching $url"
    anew=no
    for try in 1 2 3 4 5 6 7 8 9; do
        had=$(size "$file.part")
        status=0
        download "$url" "$file.part" || status=$?
        has=$(size "$file.part")
        if [ $status = 0 ]; then
            mv "$file.part" "$file" && return 0
        elif [ "$has" -gt "$had" ]; then
            say "the connection broke after $has bytes; going on from there (try $try of 9)"
            sleep 1
        elif [ "$had" -gt 0 ] && [ $anew = no ] && refused_range $status; then
            rm -f "$file.part" && anew=yes
        else
            break
        fi
    done
    return 1
}

size() { if [ -f "$1" ]; then wc -c <"$1" | tr -d ' '; else echo 0; fi; }

# By the tool's exit status: curl 22 is an HTTP error, 33 and 36 a range refused; wget 8 an HTTP error, 1 the rest
refused_range() { case $1 in 1 | 8 | 22 | 33 | 36) true ;; *) false ;; esac; }

# get NAME: fetches, unpacks and checks in data/.fetch/NAME; only then the corpus appears in data/NAME
get() {
    if there "$1"; then
        echo "$1: data/$1 is there"
        return 0
    fi
    set -- "$1" "$(ask base "$1")" # $2, not a variable: getting the base would change that
    [ -z "$2" ] || get "$2" || return 1
    name=$1 work=data/.fetch/$1
    mkdir -p "$work" && rm -rf "$work/out" || return 1
    ask sources "$name" >"$work/sources" || return 1
    if [ -s "$work/sources" ]; then
        get_from_sources || return 1
    else
        ask make "$name" "$work/out" ${2:+"data/$2"} || return 1
    fi
    if [ ! -e "data/$name" ]; then
        mv "$work/out" "data/$name" || return 1
    else # other files are in that folder: leave them, and bring the training text last
        for file in SHA256SUMS test.txt valid.txt train.txt; do
            mv "$work/out/$file" "data/$name/$file" || return 1
        done
    fi
    rm -rf "$work"
    rmdir data/.fetch 2>/dev/null || true
    echo "$name: data/$name is complete"
}

get_from_sources() {
    n=0
    while read -r urls; do
        n=$((n + 1))
        mkdir -p "$work/$n"
        fetched=yes
        for url in $urls; do
            fetch "$url" "$work/$n" </dev/null || { fetched=no && break; }
        done
        [ $fetched = yes ] || continue
        rm -rf "$work/out"
        if ask make "$name" "$work/out" "$work/$n"; then return 0; fi
        say "$name: what came from ${AWD_MIRROR:-${url%/*}} is damaged or not the corpus; thrown away"
        rm -rf "${work:?}/$n" "$work/out"
    done <"$work/sources"
    say "$name: no source gave it; run ./getdata.sh $name again later (what has come is kept)," \
        "set AWD_MIRROR, or put train.txt, valid.txt, test.txt into data/$name"
    return 1
}

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=$(command -v python3 || command -v python) || { say "needs python3" && exit 1; }
known=$(ask names) || exit 1
check=no names=
for argument; do
    case $argument in
    -h | --help) # the comment at the top, the names put in
        sed -n "2,/^set/{/^#/!d;s/^# \{0,1\}//;s/CORPORA/$known/;p;}" "$0" && exit 0
        ;;
    --check) check=yes ;;
    all) names="$names $known" ;;
    *)
        case " $known " in
        *" $argument "*) names="$names $argument" ;;
        *) say "$argument: no such corpus; there are: $known, all" && exit 2 ;;
        esac
        ;;
    esac
done

if [ $check = yes ]; then
    if [ -z "$names" ]; then
        for name in $known; do if there "$name"; then names="$names $name"; fi; done
        [ -n "$names" ] || { say "no corpus is in ./data; run ./getdata.sh" && exit 1; }
    fi
    failed=0
    for name in $names; do
        if ! there "$name"; then
            say "$name: not complete in data/$name; run ./getdata.sh $name" && failed=1
        elif ! ask check "$name" "data/$name"; then
            say "$name: data/$name is not what it should be; remove it and run ./getdata.sh $name" && failed=1
        fi
    done
    exit $failed
fi
trap 'say "interrupted; the same command goes on from here"; exit 130' INT
trap 'say "stopped; the same command goes on from here"; exit 143' TERM
failed=0
for corpus in ${names:-penn wikitext-2}; do
    get "$corpus" || failed=1
done
exit $failed
