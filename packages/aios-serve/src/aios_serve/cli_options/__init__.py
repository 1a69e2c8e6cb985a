"""Options of `aios-serve`, with their help: one module for each panel of `--help`, in the order in which it shows them.

`model` which model · `http` where it listens · `memory` pages and weights · `batching` who runs when · `parallelism`
ranks · `process` threads, replicas, restarts. What an option may be is for EngineConfig and ServerConfig to say, whose
defaults they have, too.
"""
