"""Text: the table of corpora, files on disk, plain text to tokens and back, tokens to ids."""
