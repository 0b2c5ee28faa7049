"""The batch manager: sequences in, token ids and text out. No torch, no HTTP.

batch_manager the engine thread and its step · scheduler which sequences run · node_budget N of the next step ·
in_flight passes that run on the device · row_retry a failed pass, row by row · sequence one sequence's state ·
detokenizer ids to text · deliveries deltas to their sinks · health is it stalled, has it failed, may it start again ·
metrics counters · quiet_log a logger that never raises
"""
