"""A CPU's kernels: everything that needs Numba, and nothing else. Kernels read tensors by their addresses; results are
bit for bit the same for any tree, batch and number of threads.

base          records, C functions, bfloat16 numbers
threads       kernels on OpenMP's threads · workers: OpenMP's worker threads (needs no Numba)
vectors       LLVM's vector instructions
int16_inputs, int_tiles, int_products: inputs as integers, tiles of a product, int4 and int8 linear layers
few_bits      the few-bit steps of weights that are few-bit numbers already
layer_ops     norms, activations, rotary positions, the slab's rows
attention_tiles, attention: two products of a few queries; attention with one order of sums
tape          a decoder layer as one call · layers: traced layers · whole_pass: a pass without the model's own code
step, search, draft: around the pass: open and close a step, find the largest logits, draft with sequential heads
warm_up       compiles the kernels while a model is read
"""
