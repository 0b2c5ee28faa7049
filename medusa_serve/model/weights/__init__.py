"""Weights in few bits, and the choice of a number format. The layers use torch; a CPU's own layers are in cpu/.

int4 · int8 · nf4      linear layers        number_format  the choice, by measurement
machine_cache          measurements that are kept
"""
