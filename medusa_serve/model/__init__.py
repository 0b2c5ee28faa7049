"""The Medusa model: tensors in, tensors out. Only this package and training/ import torch.

One step (step.py), the same on every machine:

    open    kernels.open_step   the slots' drafts become a tree of N nodes for each of B rows      tables, drafting/
    run     forward.run         one pass of the unmodified model over B × N nodes                  forward/
    walk    kernels.walk        each row picks its own tokens, as long as a node holds the pick    sampling/
    commit  forward.commit      keep the KV rows of the accepted path                              forward/slab
    draft   drafter.draft       the heads' candidates for the next tree                            drafting/

runner         starts steps; slots and ids for the engine       step      the step, in five statements
kernels        the operations that differ by machine            tables    what a step knows about each slot
torch_kernels  these operations by torch alone: the reference   shapes    the sizes of trees
build          from a loaded model to a runner                  selftest  tests at load
timing         how long a step of B rows and N nodes takes

loading/ from a name to a model · weights/ few-bit weights · forward/ passes, attention, slab · sampling/ from logits to
tokens · drafting/ heads, trees, lookup · cpu/ all Numba · gpu/ all Triton and CUDA graphs

Letters in shapes: B rows, N nodes (the root counts), D depth, K heads, k candidates of a head, V vocabulary, H hidden
size, S slots, C columns of a slot, L layers.
"""
