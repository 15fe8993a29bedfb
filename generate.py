"""Text from a saved model, or the next words it expects.

    python generate.py --save PTB.pt --prompt "the company said" --words 200 --temperature 0.8 --top_k 50
    python generate.py --save PTB.pt --prompt "the company" --next 10

Every text begins after an `<eos>`, the end of the line before it. Prompt and text are plain text if the model has a
tokenizer, or if its words are characters or bytes; otherwise they are words with spaces between them.

Shapes: T time, B batch, V vocabulary.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from corpus.codec import Codec, WordCodec, make_codec
from corpus.read import EOS, encode_line, make_encoder
from harness.files import open_model
from harness.flags import COUNT, PLAIN, POSITIVE, SEED, SWITCH, Flag, number, parse_evaluation
from harness.script import run_script
from model import Criterion, Hidden, RNNModel
from utils import LabelEncoder, UserError


def next_word_prob(logprob: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The distribution to draw from, in float64.

    Args:
        logprob: (V,), the model's log-probabilities.
        temperature: divides the log-probabilities: below 1 sharpens, above 1 flattens.
        top_k: keeps only the k most probable words; 0: all.
        top_p: of those, keeps the most probable words that together have this share of the probability, at least
            one (Holtzman et al., arXiv 1904.09751, section 3.1); 1: all.

    Returns:
        (V,), summing to 1.
    """
    logits = logprob.double() / temperature
    if 0 < top_k < len(logits):
        kept = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter_(0, kept.indices, kept.values)
    prob = logits.softmax(0)
    if top_p < 1:
        ranked, words = prob.sort(descending=True, stable=True)
        enough = ranked.cumsum(0) - ranked >= top_p  # the words before it already hold the share
        prob[words[1:][enough[1:]]] = 0
        prob /= prob.sum()
    return prob


@torch.no_grad()
def next_logprob(
    model: RNNModel, criterion: Criterion, words: list[int], hidden: list[Hidden]
) -> tuple[Tensor, list[Hidden]]:
    """Reads `words` from the state `hidden` on; returns the log-probabilities of the next word, (V,) on the CPU."""
    source = torch.tensor(words, device=model.encoder.weight.device)[:, None]  # (T, 1)
    output, hidden = model(source, hidden)
    logprob = criterion.logprob(model.decoder.weight, model.decoder.bias, output[-1:])  # (1, V)
    return logprob[0].cpu(), hidden


def generate(
    model: RNNModel,
    criterion: Criterion,
    prompt: list[int],
    n: int,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator,
    never: int | None = None,
) -> Iterator[int]:
    """Draws `n` words after `prompt`, one by one; the word `never` is not drawn."""
    words, hidden = prompt, model.init_hidden(1)
    for _ in range(n):
        logprob, hidden = next_logprob(model, criterion, words, hidden)
        if never is not None:
            logprob[never] = -torch.inf
        prob = next_word_prob(logprob, temperature, top_k, top_p)
        words = [int(torch.multinomial(prob, 1, generator=generator))]
        yield words[0]


def encode_prompt(prompt: str, encoder: LabelEncoder, codec: Codec) -> list[int]:
    """The ids of a prompt, after the `<eos>` that every text begins with; each newline is an `<eos>` too.

    Raises:
        UserError: a word is unknown and the vocabulary has no `<unk>`; or the prompt is not UTF-8.
    """
    if not (isinstance(codec, WordCodec) and codec.bytes):
        try:
            prompt.encode()
        except UnicodeEncodeError:  # Python gives bytes that are no UTF-8 as lone surrogates
            raise UserError(f"--prompt {prompt!r}: is not UTF-8; give it in UTF-8") from None
    ids = []
    for line in prompt.split("\n"):
        ids += [encoder.token_to_index[EOS], *encode_line(codec.encode(line), encoder, f"--prompt {prompt!r}")]
    return ids


GENERATION = [
    Flag("--prompt", {}, "", "the text to go on from; newlines end its lines"),
    PLAIN,
    Flag("--words", POSITIVE, 1000, "words to draw, newlines included"),
    Flag("--temperature", {"type": number(float, 0.001)}, 1.0, "divides the logits: below 1 safer, above wilder"),
    Flag("--top_k", COUNT, 0, "draw from the K most probable; 0: all"),
    Flag("--top_p", {"type": number(float, 0, most=1)}, 1.0, "draw from the most probable that hold P; 1: all"),
    Flag("--no_unk", SWITCH, True, "never draw <unk> (the default)"),
    Flag("--unk", {"dest": "no_unk", "action": "store_false"}, True, "draw <unk> too"),
    Flag("--seed", SEED, 1111, "of the draws"),
    Flag("--next", {**POSITIVE, "metavar": "K"}, None, "print the K most probable words after the prompt instead, "
         "with their probabilities under the model"),
]  # fmt: skip


def main() -> None:
    args = parse_evaluation(__doc__, ("generation", GENERATION))
    saved = open_model(args)
    model, criterion, vocab = saved.model, saved.criterion, saved.vocab
    codec, encoder = make_codec(saved.tokenizer, vocab, f"--save {args.save}", args.plain), make_encoder(vocab)
    prompt = encode_prompt(args.prompt, encoder, codec)
    if args.next:
        logprob, _ = next_logprob(model, criterion, prompt, model.init_hidden(1))
        best = logprob.double().exp().topk(min(args.next, len(vocab)))
        for prob, word in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            print(f"{prob:.6f}\t{codec.shown(vocab[word])}")
    else:
        generator = torch.Generator().manual_seed(args.seed)
        never = encoder.unknown_index if args.no_unk else None
        words = generate(
            model, criterion, prompt, args.words, args.temperature, args.top_k, args.top_p, generator, never
        )
        for word in itertools.chain(prompt[1:], words):
            print(codec.piece(vocab[word]), end="", flush=True)
        print(codec.end(), end="", flush=True)


if __name__ == "__main__":
    run_script(main)
