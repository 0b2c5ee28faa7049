"""ASGI middleware around the routes: what refuses or counts a request before its body is understood, and the one format
of errors. Nothing here knows an API or the engine."""
