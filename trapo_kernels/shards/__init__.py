"""This folder has what a vocabulary takes that is sharded over ranks: its row kernel and heads (`vocab_parallel`), and
the check that all ranks were given the same (`agreement`)."""
