"""Compares validation perplexities of a run with those of an earlier run of the same command.

    python results/check.py runs/ptb-qrnn.pt.log.jsonl results/ptb-qrnn-h100.log.jsonl 5 10 31

Arguments: the log of the run, that of the earlier one, and the epochs. Exit status 1: an epoch is missing, or its
perplexity is more than a tenth above or below.
"""

import json
import sys
from pathlib import Path

TOLERANCE = 0.1


def valid_ppl(path: str) -> dict[int, float]:
    """epoch -> perplexity, of a log."""
    records = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return {
        record["epoch"]: record["ppl"] for record in records if record["kind"] == "valid" and not record.get("partial")
    }


def main() -> int:
    path, known_path, *epochs = sys.argv[1:]
    ours, known = valid_ppl(path), valid_ppl(known_path)
    status = 0
    for epoch in map(int, epochs):
        if epoch not in ours:
            print(f"{path}: has not reached epoch {epoch}; start the run again, and it goes on", file=sys.stderr)
            return 1
        change = ours[epoch] / known[epoch] - 1
        print(f"| epoch {epoch:3d} | valid ppl {ours[epoch]:8.1f} | {known_path} {known[epoch]:8.1f} | {change:+.1%}")
        if not abs(change) <= TOLERANCE:
            status = 1
    if status:
        print(f"{path}: is more than {TOLERANCE:.0%} away from {known_path}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
