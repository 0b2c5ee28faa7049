"""One pass of an unmodified Hugging Face model over slots. Nothing here picks a token, and no machine is named.

tree_forward    many rows, many nodes, one pass     masked_forward  the same with the model's own attention
plain_forward   one row at a time                   passes          which code runs a pass, as a value
view            what a pass sees                    attention       attention over slots, by torch
slab            keys and values of all slots        prefill_blocks  prompts in blocks
hidden_tap      what the heads read of a pass       trace           a layer as a function of its weights
split           layers over several GPUs            replaced · transfer: attributes for a while; host to device
"""
