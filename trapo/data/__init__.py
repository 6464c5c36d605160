"""This folder has what a run learns from: problems of files or generators, their token ids, and which of them a step
draws."""
