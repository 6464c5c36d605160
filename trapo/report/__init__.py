"""This folder has what a run shows of itself: metrics, the live display, loggers, summary, and the page and picture
made of them."""
