"""The routes: for each API its bodies, its answers and their format; the pages that say what is served.

Generating text is asked of submit.py; nothing here calls the engine.
"""
