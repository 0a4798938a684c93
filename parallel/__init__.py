"""Who holds what: process groups, pipeline placement, the Megatron engine, checkpoints, and the CPU stand-in.

Nothing here knows attention or the configuration; sizes and costs come in as numbers, models as modules.
"""
