"""The porch: a server, a panel and a tunnel from a cell of Colab, Kaggle or Jupyter."""
