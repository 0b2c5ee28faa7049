"""A public address through ngrok: the program, its errors in plain words, the token, and the month's quota.

No file here knows a model or an engine: a tunnel leads to a port.
"""
