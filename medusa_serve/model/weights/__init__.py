"""Weights in few bits, and which numbers a machine computes in. Layers by torch's operations; a CPU's own are in cpu/.

int4 · int8 · nf4      linear layers        number_format  the choice, by measurement
machine_cache          measurements that are kept
"""
