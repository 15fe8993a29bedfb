"""--plain: sentences as people write them, in the forms of the published corpora."""

import re
from pathlib import Path

import pytest
from test_surprisal import table, write
from toys import LEVELS, WORDS, call, error_line, prepare_levels, save_model, text_of

import generate
import score

PTB = (
    "<unk> the N company do n't ca wo did 's it is said says $ mr. u.s. of in and third-quarter a years inc. can not '"
)
WIKI = (
    "<unk> <eos> the The , . = @-@ @,@ @.@ well known 1 000 3 5 \" 's didn 't It it He ( ) cat U.S. – : players ' ..."
)
VOCABULARIES = {
    "Penn Treebank": [*PTB.split(), "<eos>"],
    "WikiText": WIKI.split(),
    "Penn Treebank, characters": [*"_abcdefghijklmnopqrstuvwxyzN<>#$&'*-./\\0123456789", "<eos>"],
    "text8": [*"_abcdefghijklmnopqrstuvwxyz", "<eos>"],
    "with case": ["<unk>", *"_abcdefghijklmnopqrstuvwxyzTC,.", "<eos>"],
    "bytes": [*(str(i) for i in range(256) if i != 10), "<eos>"],
    "words": WORDS,
}

# A sentence, and its tokens; one that the vocabulary lacks stands between angle brackets.
SENTENCES = {
    "Penn Treebank": {
        "The company didn't say it's in the U.S.": "the company did n't <say> it 's in the u.s.",
        '"It is," said Mr. Smith (of the company), "1,000 years."': "it is said mr. <smith> of the company N years",
        "Can't it? Won't the company? Don’t!": "ca n't it wo n't the company do n't",
        "The company says $5.5 and 3 years": "the company says $ N and N years",
        "In the third-quarter: the company's Inc.": "in the third-quarter the company 's inc.",
        "It cannot, said the company": "it can not said the company",
        "It did 8.45% in N years": "it did N N in N years",  # as that corpus has it: % is N, too
        "The U.S.-backed company": "the <u.s.-backed> company",
        "the company 's N do n't": "the company 's N do n't",  # as it is already
    },
    "WikiText": {
        "The well-known cat, it didn't.": "The well @-@ known cat , it didn 't .",
        "It's 1,000 or 3.5 (the cat)": "It 's 1 @,@ 000 <or> 3 @.@ 5 ( the cat )",
        'He: "The U.S. – it’s the cat."': 'He : " The U.S. – it \'s the cat . "',
        "He didn’t, the players' cat": "He didn 't , the players ' cat",
        "He... the cat": "He ... the cat",
        "The well @-@ known cat , 1 @,@ 000 .": "The well @-@ known cat , 1 @,@ 000 .",
    },
    "Penn Treebank, characters": {
        "the company is in": "t h e _ c o m p a n y _ i s _ i n",
        "The Company's": "t h e _ c o m p a n y _ ' s",
        "It is, said": "i t _ i s _ s a i d",
    },
    "text8": {"the cat": "t h e _ c a t", "The cat": "t h e _ c a t"},
    "with case": {"The Cat, é": "T h e _ C a t , _ <é>"},
    "bytes": {"Thé, 5": "84 104 195 169 44 32 53", "🎉": "240 159 142 137"},
    "words": {"w1 w2": "w1 w2", "W1, w2 zebra": "w1 w2 <zebra>"},
}
SAID = {  # on stderr, in one line before the total
    "Penn Treebank": ["lower case", "numbers as N", "contractions", "without punctuation"],
    "WikiText": ["contractions", "@-@", "@,@", "@.@", "punctuation apart"],
    "Penn Treebank, characters": ["characters"],
    "with case": ["characters"],
    "bytes": ["bytes"],
}
CASES = [(name, sentence, tokens) for name, sentences in SENTENCES.items() for sentence, tokens in sentences.items()]


@pytest.fixture(scope="module")
def saves(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("saves")
    return {name: save_model(folder / f"{i}.pt", vocab=vocab) for i, (name, vocab) in enumerate(VOCABULARIES.items())}


@pytest.mark.parametrize(("name", "sentence", "tokens"), CASES)
def test_a_sentence_becomes_the_tokens_of_its_corpus(tmp_path, capsys, saves, name, sentence, tokens):
    """Case of unknown words aside, which does not matter."""
    _, rows, _ = table(capsys, "--save", saves[name], "--plain", "--tokens", write(tmp_path / "text", [sentence]))
    shown = [re.sub("^<unk> (.*)", lambda found: f"<{found[1].lower()}>", row[2]) for row in rows]
    assert shown == [*tokens.split(), "<eos>"]


@pytest.mark.parametrize("name", SAID)
def test_the_rule_is_said(tmp_path, capsys, saves, name):
    """Once, whatever the number of lines; stdout has the table alone."""
    text = write(tmp_path / "text", ["the cat"] * 3)
    head, rows, err = table(capsys, "--save", saves[name], "--plain", text)
    said = [line for line in err.splitlines() if "--plain" in line]
    assert len(said) == 1
    for word in SAID[name]:
        assert word in said[0]
    assert (head[0], len(rows)) == ("line", 3)


def test_blimp_works_on_a_model_of_words(tmp_path, capsys, saves):
    """Pairs, lists and tables in plain text have the figures of the corpus's form."""
    save, plain = saves["Penn Treebank"], [("The company doesn't.", "It's the U.S."), ("It is, said Mr. Z.", "$5.5")]
    form = [("the company <unk> n't", "it 's the u.s."), ("it is said mr. <unk>", "$ N")]
    figures = []
    for pairs, flags in ((plain, ["--plain"]), (form, [])):
        each = tmp_path / "each.tsv"
        file = write(tmp_path / "p.tsv", ["good\tbad", *map("\t".join, pairs)])
        table(capsys, "--save", save, "--pairs", file, "--rows", each, *flags)
        own = [line.split("\t")[5:] for line in each.read_text().splitlines()[1:]]
        file = write(tmp_path / "lists", [f"a\t{i}\t{text}" for i, text in enumerate(sum(pairs, ()))])
        own += [row[1:4] for row in table(capsys, "--save", save, "--nbest", file, "--all", *flags)[1]]
        figures.append(own)
    assert figures[0] == figures[1]
    words = ["word", "The", '"company\'s"', "1,000", "-", "years."]
    file = write(tmp_path / "t.tsv", words)
    _, rows, _ = table(capsys, "--save", save, "--plain", "--table", file, "--word", "word")
    text = write(tmp_path / "text", ["the company 's N years"])
    known = {row[2]: float(row[5]) for row in table(capsys, "--save", save, "--words", text)[1]}
    assert [row[0] for row in rows] == words[1:]
    assert [row[1] for row in rows if row[0] != "-"] == ["1", "2", "1", "1"]  # pieces
    expected = [known["the"], known["company"] + known["'s"], known["N"], known["years"]]
    assert [float(row[3]) for row in rows if row[0] != "-"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("level", LEVELS)
def test_a_tokenizer_needs_no_plain(tmp_path, capsys, level):
    """Refused by both scripts, since it does nothing there."""
    folder = prepare_levels(tmp_path, ["the cat sat"] * 9, 290)[level]
    tokenizer, vocab = (folder / "tokenizer.json").read_text(), ["<eos>", "<unk>", "the"]
    save, text = save_model(tmp_path / "m.pt", vocab=vocab, tokenizer=tokenizer), write(tmp_path / "text", ["the cat"])
    capsys.readouterr()
    for script, *argv in ((score, text), (generate, "--prompt", "the", "--words", 1)):
        assert call(script, "--save", save, "--plain", *argv) == 2
        assert "--plain" in error_line(capsys)


@pytest.mark.parametrize(
    ("name", "plain", "form"),
    [
        ("Penn Treebank", "The company's $1,000, said Mr.", "the company 's $ N said mr."),
        ("WikiText", "The well-known cat's 3.5", "The well @-@ known cat 's 3 @.@ 5"),
    ],
)
def test_a_prompt_may_be_plain(capsys, saves, name, plain, form):
    """The text goes on, and the next words are, as after the prompt in the corpus's form."""
    for flags in (["--words", 8], ["--next", 5]):
        argv = ["--save", saves[name], *flags]
        assert call(generate, *argv, "--prompt", plain, "--plain") == 0
        out, err = capsys.readouterr()
        assert out == text_of(capsys, generate, *argv, "--prompt", form)
        assert "--plain" in err
