"""The kernels for CPUs: all code that needs Numba, and nothing else. Kernels get tensors as addresses. Results are bit
for bit the same for any tree, batch and number of threads.

base          records, C functions, bfloat16 numbers
threads       kernels on OpenMP's threads · workers: OpenMP's worker threads (needs no Numba)
vectors       LLVM's vector instructions
int16_inputs, int_tiles, int_products: inputs as integers, tiles of a product, int4 and int8 linear layers
few_bits      the int4 or int8 steps of weights that were quantized before
layer_ops     norms, activations, rotary positions, the slab's rows
attention_tiles, attention: two products of a few queries; attention with one order of sums
tape          a decoder layer as one call · layers: traced layers · whole_pass: a pass without the model's own code
step, search, draft: open and close a step, find the largest logits, draft with sequential heads
warm_up       compiles the kernels while a model is read
"""
