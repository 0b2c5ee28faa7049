"""One pass of an unmodified Hugging Face model over slots. No code here picks a token or names a machine.

tree_forward    many rows, many nodes, one pass     masked_forward  the same with the model's own attention
plain_forward   one row at a time                   passes          the code that runs a pass, as a value
view            what a pass sees                    attention       attention over slots, by torch
slab            keys and values of all slots        prefill_blocks  prompts in blocks
hidden_tap      hidden states for the heads         trace           a layer as a function of its weights
split           layers over several GPUs            replaced · transfer: attributes for a while; host to device
"""
