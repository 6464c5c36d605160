"""This folder has small things that know nothing of training: files, the text of a configuration, the terminal, a
stopwatch."""
