"""The kernels and captures for GPUs: all code that needs Triton, Inductor or CUDA graphs, and nothing else.

kernels     the operations of a step by Triton     graphs · capture  a complete step as a CUDA graph
attention   tree attention over slots              pick              each node's token from its logits
step        opens and closes a step                search · noise    the tree search; keyed noise in kernels
layers      decoder layers compiled                compiled_heads    heads compiled     background  both, while idle
"""
