"""Heads trained on the model's own answers: prompts → distill → train_heads. Used by the command line alone.

Letters in shapes: B rows of a batch, S tokens of the longest row, R answer positions that heads learn from, D depths,
H hidden size, V' draft vocabulary.
"""
