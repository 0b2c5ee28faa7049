"""From logits to tokens, along the walked path. No code here knows a drafter, a slab or a machine.

accept     the walk through a verified tree            filters   temperature, top-k, top-p, min-p, and the pick
penalties  biases and penalties                        noise     keyed Gumbel noise       logprobs  log-probabilities
"""
