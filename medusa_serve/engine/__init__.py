"""The batch manager: sequences in, token ids and text out. No torch, no HTTP."""
