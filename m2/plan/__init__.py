"""Planning: what a run takes on TPUs that are not here (`config.mode=plan`).

Programs are compiled ahead of time for the topology by its own compiler; what
they hold, move and compute is read off the result and set against counts made
from the configuration alone. Nothing is allocated and nothing runs.
"""
