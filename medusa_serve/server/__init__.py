"""The FastAPI app: HTTP in, HTTP out. No torch."""
