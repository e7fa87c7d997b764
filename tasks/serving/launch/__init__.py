"""Servers of ours: the command line that says what is asked for, starting, waiting, finding again, ending."""
