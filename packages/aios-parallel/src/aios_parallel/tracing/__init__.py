"""Where the time of a group of ranks goes: recording on the ranks, collecting on the driver, and what it adds up to."""
