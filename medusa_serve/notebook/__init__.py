"""A server, a panel and a tunnel from a cell of Colab, Kaggle or Jupyter.

Only what a notebook needs: starting and finding the server, what a cell prints, and where a platform differs.
"""
