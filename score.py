"""The surprisal of sentences under a saved model: log-probability and perplexity of every line of a file.

    python score.py --save PTB.pt sentences.txt          # each line by itself
    python score.py --save PTB.pt article.txt --carry    # line after line, as one text

A line has the form of the corpus: words apart by spaces (`_` for a space in a character model of the Penn
Treebank). It is scored after an `<eos>`, and the `<eos>` that ends it counts as a token. One row per line, tab
separated: its number, tokens, unknown words, log-probability in nats, perplexity, the unknown words. What all
lines come to together goes to stderr.

Shapes: T time, B lines side by side.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import torch

from data import EOS, encode_line, make_encoder
from harness import SWITCH, Flag, open_model, parse_evaluation, ppl, run_script
from model import Criterion, Hidden, RNNModel
from utils import UserError

BATCH = 16  # lines scored side by side, when the state is reset between them
ROWS = 1024  # positions at once, of all lines together


@torch.no_grad()
def line_logprobs(
    model: RNNModel, criterion: Criterion, lines: list[list[int]], eos: int, hidden: list[Hidden]
) -> tuple[list[float], list[Hidden]]:
    """Log-probabilities of B lines in nats, each with the `<eos>` that ends it, and the state at the end.

    Args:
        lines: the words of each line. Shorter ones are filled up; what comes after a line's end changes
            nothing before it, but the returned state is of use for a single line only.
        hidden: the states to start from, B columns.
    """
    length = max(map(len, lines)) + 1
    filled = [[eos, *line, *[eos] * (length - len(line))] for line in lines]
    words = torch.tensor(filled, device=model.encoder.weight.device).T  # (T + 1, B)
    counted = torch.arange(length)[:, None] <= torch.tensor([len(line) for line in lines])  # (T, B)
    total = torch.zeros(len(lines), dtype=torch.float64)
    rows = max(1, ROWS // len(lines))
    for source, target, mask in zip(
        words[:-1].split(rows), words[1:].split(rows), counted.split(rows), strict=True
    ):
        output, hidden = model(source, hidden)
        loss = criterion(model.decoder.weight, model.decoder.bias, output, target, reduction="none")
        total -= loss.cpu().double().view_as(mask).where(mask, 0.0).sum(0)
    return total.tolist(), hidden


def read_lines(path: str) -> Iterator[str]:
    """The lines of a UTF-8 file, split at newlines only.

    Raises:
        UserError: it cannot be read, is empty or not UTF-8.
    """
    number = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 in line {number}; convert the file, e.g. with iconv") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; give a text file") from None
    if not number:
        raise UserError(f"{path}: is empty; give a text with at least one line")


def score(
    model: RNNModel, criterion: Criterion, path: str, vocab: list[str], carry: bool
) -> Iterator[tuple[object, ...]]:
    """Yields a row for each line of a file: tokens, unknown, log-probability, the unknown words.

    Raises:
        UserError: see `read_lines`; or a word is unknown and there is no `<unk>`.
    """
    encoder, lines, hidden, first = make_encoder(vocab), read_lines(path), model.init_hidden(1), 1
    eos = encoder.token_to_index[EOS]
    while batch := list(islice(lines, 1 if carry else BATCH)):
        ids = [encode_line(line, encoder, f"{path}, line {i}") for i, line in enumerate(batch, first)]
        start = hidden if carry else model.init_hidden(len(batch))
        logprobs, hidden = line_logprobs(model, criterion, ids, eos, start)
        for line, logprob in zip(batch, logprobs, strict=True):
            words = line.split()
            unknown = [word for word in words if word not in encoder.token_to_index]
            yield len(words) + 1, len(unknown), logprob, " ".join(unknown)
        first += len(batch)


def main() -> None:
    how = [
        Flag("text", {"metavar": "FILE"}, None, "the text, one sentence per line"),
        Flag("--carry", SWITCH, False, "go on from line to line, as in one text (else each starts afresh)"),
    ]
    args = parse_evaluation(__doc__, ("scores", how))
    saved = open_model(args)
    if EOS not in saved.vocab:
        raise UserError(f"--save {args.save}: has no {EOS} in its vocabulary; use a model of main.py's")
    total = Counter()
    for row in score(saved.model, saved.criterion, args.text, saved.vocab, args.carry):
        tokens, unknown, logprob, words = row
        if not total:  # the file can be read
            print("line", "tokens", "unknown", "logprob", "ppl", "unknown words", sep="\t")
        total.update(lines=1, tokens=tokens, unknown=unknown, logprob=logprob)
        print(total["lines"], tokens, unknown, f"{logprob:.4f}", f"{ppl(-logprob / tokens):.2f}", words, sep="\t")
    figures = f"logprob {total['logprob']:.4f} | ppl {ppl(-total['logprob'] / total['tokens']):.2f}"
    counts = " | ".join(f"{name} {total[name]}" for name in ("lines", "tokens", "unknown"))
    print(f"| total | {counts} | {figures}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
