"""Tiny models are faster on one thread, and two test runs beside each other do not spin against one another."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
