"""The surprisal of text under a saved model, by line, token or word; minimal pairs and n-best lists.

    python score.py --save PTB.pt sentences.txt                   # a row per line
    python score.py --save PTB.pt sentences.txt --tokens          # a row per token
    python score.py --save PTB.pt sentences.txt --words           # a row per word
    python score.py --save PTB.pt article.txt --carry             # line after line, as one text
    python score.py --save PTB.pt sentences.txt --adaptive        # the model learns from each line after scoring it
    python score.py --save PTB.pt --table times.tsv --word word --sentence sentence --story story
    python score.py --save PTB.pt --pairs blimp/ --rows pairs.tsv # accuracy on minimal pairs, by paradigm
    python score.py --save PTB.pt --nbest lists.txt --weight 0.5  # the best one of each list

A model with a tokenizer takes plain text, and any other model with --plain. Without it that one takes the form of its
corpus: words with spaces between them (in a character model of the Penn Treebank, characters with spaces between them
and `_` for a space). A line is scored after an `<eos>`, and the `<eos>` at its end is one of its tokens, but not of
pairs and lists (see --eos). Blank lines are passed over. Output: tab separated rows below a header, quoted as csv
does; the totals go to stderr. A token that is not in the vocabulary counts as unknown; --tokens shows it as
`<unk> token`.

Surprisal is -log2 p, in bits. Entropy is that of the distribution before the token. Rank 1 is the likeliest token.
"""

from argparse import Namespace
from functools import partial

from corpus.read import read_corpus
from dynamiceval import DYNAMIC, MovingWeights, fill_in, find_statistics, weights_of
from evaluate import tempered
from harness.files import open_model
from harness.flags import PLAIN, SWITCH, TEMPERED, Flag, number, parse_evaluation
from harness.script import run_script
from scoring.choices import print_hypotheses, print_pairs
from scoring.rows import Scorer, print_lines
from scoring.tables import print_table
from surprisal import Reader, score_adaptively, score_apart, score_carried
from utils import UserError

WEIGHT = number(float, -1e9, most=1e9)
SCORES = [
    Flag("text", {"nargs": "?", "metavar": "FILE"}, None, "the text, - for stdin: one sentence per line"),
    Flag("--tokens", SWITCH, False, "a row per token: surprisal, entropy, rank"),
    Flag("--words", SWITCH, False, "a row per word (white space separates words): its tokens' summed surprisal; whole: "
         "the same with the space counted to the word that it ends, for words of one place to be compared"),
    PLAIN,
    TEMPERED,
    Flag("--nats", SWITCH, False, "surprisal and entropy in nats (default: in bits)"),
    Flag("--eos", {"choices": ["auto", "count", "skip"]}, "auto", "whether the <eos> at the end of a line counts; "
         "auto: in lines, tokens, words and tables, and not in pairs and lists"),
    Flag("--carry", SWITCH, False, "line after line, as one text (default: each line from a fresh state)"),
    Flag("--context", {"metavar": "FILE"}, None, "read the line of the same number in FILE before each line"),
    Flag("--adaptive", SWITCH, False, "learn from each line, in segments of --bptt tokens, after they were scored"),
]  # fmt: skip
TABLE = [
    Flag("--table", {"metavar": "FILE"}, None, "a table with a word per row: the same rows with columns added; commas "
         "between cells in a .csv, else tabs"),
    Flag("--word", {"metavar": "COLUMN"}, None, "the column of the words"),
    Flag("--sentence", {"metavar": "COLUMN"}, None, "rows with the same cell there are a sentence "
         "(default: the story is one)"),
    Flag("--story", {"metavar": "COLUMN"}, None, "rows with the same cell there are one text, which begins "
         "from a fresh state (default: each sentence does)"),
]  # fmt: skip
PAIRS = [
    Flag("--pairs", {"metavar": "FILE", "nargs": "+"}, None, "minimal pairs: BLiMP's JSON lines, or a good and a bad "
         "column; files or folders of them"),
    Flag("--rows", {"metavar": "FILE"}, None, "write a row per pair into FILE"),
]  # fmt: skip
LISTS = [
    Flag("--nbest", {"metavar": "FILE"}, None, "lists to choose from: id, scores, text with tabs between them; or "
         "Moses's, Marian's, Kaldi's"),
    Flag("--weight", {"type": WEIGHT}, 1.0, "of the log-probability, beside the score"),
    Flag("--score_weights", {"type": WEIGHT, "nargs": "+"}, None, "of each score (default: 1)"),
    Flag("--length_bonus", {"type": WEIGHT}, 0.0, "is added per word"),
    Flag("--all", SWITCH, False, "a row for every text, not for the best alone"),
]  # fmt: skip
GROUPS = {"scores": SCORES, "tables": TABLE, "minimal pairs": PAIRS, "n-best lists": LISTS, "with --adaptive": DYNAMIC}


def check_uses(args: Namespace) -> None:
    """Raises UserError unless the flags go together."""
    inputs = [f"--{name}" if name != "text" else "FILE" for name in ("text", *PRINTERS) if getattr(args, name)]
    if len(inputs) != 1:
        given = f"{' '.join(inputs)}: are different inputs" if inputs else "FILE, --table, --pairs or --nbest"
        raise UserError(f"{given}; give one of them, what is to be scored")
    if args.tokens and args.words:
        raise UserError("--tokens --words: print different tables; give one of them")
    if args.table and not args.word:
        raise UserError("--table: needs --word COLUMN, the column of the words")
    useless = {
        "tokens": not args.text, "words": not args.text, "carry": not args.text or bool(args.context),
        "context": not args.text, "adaptive": bool(args.pairs or args.nbest),
        "nats": not (args.tokens or args.words or args.table),
    }  # fmt: skip
    for name, why in useless.items():
        if getattr(args, name) and why:
            other = "--context" if name == "carry" and args.context else inputs[0]
            other = "the rows of lines, whose log-probability is in nats" if name == "nats" and args.text else other
            raise UserError(f"--{name}: does not go with {other}; leave one out")


PRINTERS = {"table": print_table, "pairs": print_pairs, "nbest": print_hypotheses}


def main() -> None:
    args = parse_evaluation(__doc__, *GROUPS.items())
    check_uses(args)
    saved = tempered(open_model(args), args.temperature)
    reader = Reader(saved, args.save, args.plain)
    score: Scorer = partial(score_carried if args.carry else score_apart, saved)
    if args.adaptive:
        fill_in(args, saved)
        corpus = read_corpus(args.data or saved.args.data, saved.vocab, tokenizer=saved.tokenizer)
        ms = find_statistics(saved, f"{args.save}.stats", corpus, args)
        moving = MovingWeights(weights_of(saved), ms, args.lr, args.lamb, args.epsilon)
        score = partial(score_adaptively, saved, carry=args.carry, moving=moving, bptt=args.bptt)
    name = next((name for name in PRINTERS if getattr(args, name)), "lines")
    closing = args.eos == "count" or (args.eos == "auto" and name in ("lines", "table"))
    PRINTERS.get(name, print_lines)(score, reader, args, closing)


if __name__ == "__main__":
    run_script(main)
