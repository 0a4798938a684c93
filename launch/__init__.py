"""Starting runs elsewhere than in this terminal: `python -m launch.slurm`. What runs there is `train.py`."""
