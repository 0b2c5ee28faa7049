"""Replicas at one address, by Ray Serve (extra `ray`). Only `config` and `command` can be imported without it.

In here: what passes a request from the ingress to a replica; the replica's own server is that of server/.
"""
