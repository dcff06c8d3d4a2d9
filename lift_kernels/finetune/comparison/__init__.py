"""Comparison of fine-tuning methods from rows of finished runs: the part that trains nothing.

`rows` stores runs, `rates` chooses learning rates, `statistics` compares two methods, `summary`
compares all of them, `verdict` says the outcome in words, `picture` draws it.
"""
