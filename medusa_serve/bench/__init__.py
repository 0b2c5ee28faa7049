"""Measurements that anybody can repeat: `medusa-serve bench …`."""
