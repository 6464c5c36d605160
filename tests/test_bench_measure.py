"""The workers of `make bench`: one that dies is a row of the table, and must not keep the others waiting."""

from dataclasses import replace

from bench.measure import Shape, Worker, write_inputs
from bench.providers import PROVIDERS


def test_a_worker_whose_process_dies_is_reported(tmp_path):
    inputs = write_inputs(Shape(4, 8, 16), tmp_path)
    worker = Worker(replace(PROVIDERS[0], name="nobody"), inputs, None, threads=1)  # found by no process: it ends
    assert worker.failed
    assert worker.found == {"failed": "its process ended with 1"}


def test_a_worker_is_timed_after_it_gave_its_gradients_back(tmp_path):
    inputs = write_inputs(Shape(4, 8, 16), tmp_path)
    worker = Worker(PROVIDERS[0], inputs, None, threads=1)
    worker.time()
    worker.stop()
    assert not worker.failed
    assert worker.seconds[0] > 0
    assert worker.process.exitcode == 0
