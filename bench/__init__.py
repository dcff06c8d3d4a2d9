"""The bench room: what is timed, what is compiled, and the tables made of both."""
