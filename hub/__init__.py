"""The Hugging Face folder of a model: two files that export.py copies into it, and what makes and reads the others."""
