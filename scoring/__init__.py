"""What score.py prints: rows of lines and words, tables of words, minimal pairs and lists of hypotheses."""
