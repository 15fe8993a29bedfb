#!/bin/sh
# Fetch the corpora: ./getdata.sh --help says how. Needs python3 (or python), without any package.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=$(command -v python3 || command -v python) || { echo "getdata.sh: needs python3" >&2 && exit 1; }
PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} exec "$python" -P -m corpus.fetch "$@"
