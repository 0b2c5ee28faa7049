"""Drafters, and the trees that they fill. Code in here can change the drafts, never the text.

drafters  trees per context from heads   draft  the protocol of a drafter     pool    the search's candidates
lookup    n-grams of the sequence        tree   the shape of a draft          choose  which heads draft for a model
heads · output_layer  the modules        files · layouts · tensors  heads in files, in every published layout
draft_formats  smaller heads where memory is slow
"""
