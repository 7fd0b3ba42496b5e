"""How the miniature family is trained: ``python -m data.miniature.training``; needs a GPU to be quick."""
