"""This folder looks after what becomes of a run: its folder, checkpoints and logs, the processes it has, signals, and
when it gives up."""
