"""The Medusa model: tensors in, tensors out. With training/ the only room that imports torch.

Letters in shapes: B rows, N nodes (the root counts), D depth, K heads, k candidates of a head, V vocabulary, H hidden
size, S slots, C columns of a slot, L layers.
"""
