"""Everything that a GPU can tell about this package, in one command of nine minutes: `make gpu`, `python -m bench.gpu`.

    __main__.py    the command: stages one after another, results after every row
    stages.py      which stages there are, what they run and how long they may take
    running.py     a stage's process, its limit and its log
    rows.py        rows of a stage on disk; clocks
    results.py     the JSON of a run     page.py   the Markdown page and the table     picture.py   the plot
    environment.py build.py first_call.py smoke.py suite.py sanitizer.py ceilings.py losses.py graphs.py train_step.py
    trainer.py     the stages

With `--device cpu` every stage runs on tiny shapes, so that the command is known to work before it meets a GPU.
"""
