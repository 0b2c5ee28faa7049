"""The developers' own benches: `python -m tests.campaigns NAME …` from a clone; none of this is in the wheel.

A file is a bench, except `http_load` (clients), `invariants` (what must hold under load) and `shapes` (random models).
"""
