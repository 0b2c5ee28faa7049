"""The prompt panel: a conversation as plain data, its HTML, and the widgets.

No file here imports the server: the panel gets what it needs of it as an argument.
"""
