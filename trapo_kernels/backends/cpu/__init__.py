"""The C++ backend for CPUs: row kernels, the chunk loop by panels, gradients that leave out what hardly counts."""
