"""Collectives in C++ over memory that the processes of one host share; `csrc` begins with `group.h`."""
