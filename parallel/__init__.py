"""Who holds what: process groups, pipeline and context parallelism, the engines, checkpoints, and the CPU stand-in.

Nothing here knows attention or the configuration; sizes and costs come in as numbers, models as modules.
"""
