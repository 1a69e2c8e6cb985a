"""The control plane: one driver plans steps, the ranks run them. Framed messages over stream sockets, never pickled."""
