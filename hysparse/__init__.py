"""The HySparse architecture and its training. Start reading at `attention.py` (the paper), `stack.py` and `trainer.py`.

Imports run one way: hysparse uses parallel, kernels and data, which know nothing of it.
"""
