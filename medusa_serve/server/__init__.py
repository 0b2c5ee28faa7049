"""The FastAPI app and its web server: HTTP in, HTTP out. No torch.

In here: what every request passes, from the body to the answer. The formats of each API are in api/, what a request is
refused for before that is in guard/.
"""
