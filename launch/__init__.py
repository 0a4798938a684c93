"""Starting runs elsewhere than in this terminal: `python -m launch.slurm`, sweeps. What runs there is `train.py`."""
